"""What holds for every file of the tree, whoever writes it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from strongroom import errors

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "strongroom"
MODULES = sorted(SOURCE.rglob("*.py"))
DECODERS = sorted(path for path in (ROOT / "tests").rglob("*.py") if "decoder" in path.stem and "test" not in path.stem)

MAX_LINES = 600

# Folders that exist on one machine only. Not preceded by a word, so that `docs/work/` or a URL's path is none.
MACHINE_PATH = re.compile(rb"(?<![\w./*-])/(?:(?:work|root)/|tmp/w\b)")

# Built from parts, so that this file passes its own test.
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("deb", "debian", "org"),
        ("crates", "io"),
        ("proxy", "golang", "org"),
        ("rubygems", "org"),
        ("anaconda", "org"),
    )
]
REGISTRY = re.compile(b"|".join(re.escape(host).encode() for host in REGISTRY_HOSTS), re.IGNORECASE)

ERROR_NAMES = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.StrongroomError)
}
ERROR_CODE = re.compile(r"[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*")


@cache
def tree() -> list[Path]:
    """Every file that is tracked, or would be if it were added."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listing.decode().split("\0") if name and (path := ROOT / name).is_file()]


def findings(pattern: re.Pattern[bytes]) -> list[str]:
    found = []
    for path in tree():
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group().decode()}")
    return found


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_file_names_a_path_of_one_machine() -> None:
    assert findings(MACHINE_PATH) == []


def test_no_file_names_a_package_registry() -> None:
    assert findings(REGISTRY) == []


@pytest.mark.parametrize("line", [b"cd /" + b"work/main", b'"/' + b'root/.cache"', b"(/tmp" + b"/w/big)"])
def test_machine_paths_are_recognised(line: bytes) -> None:
    assert MACHINE_PATH.search(line)


@pytest.mark.parametrize("line", [b"docs/work/index.md", b"https://example.com/root/", b"/tmp/weights", b"/workspace/"])
def test_other_paths_are_left_alone(line: bytes) -> None:
    assert not MACHINE_PATH.search(line)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES, f"{relative(path)} is over {MAX_LINES} lines: split it by its nouns"
    assert ast.get_docstring(ast.parse(text)), f"{relative(path)} has no docstring"


def raised_codes(text: str) -> list[tuple[int, str | None]]:
    """The line and the code of each error of our tree that `text` constructs; None where the code is put together."""
    found: list[tuple[int, str | None]] = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if name not in ERROR_NAMES:
            continue
        code = node.args[0]
        if isinstance(code, ast.Constant) and isinstance(code.value, str):
            found.append((node.lineno, code.value))
        elif isinstance(code, ast.JoinedStr | ast.BinOp):
            found.append((node.lineno, None))
    return found


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_error_codes_are_noun_dot_reason(path: Path) -> None:
    # A code that is put together at run time can be neither searched for nor kept stable.
    bad = [
        f"{relative(path)}:{line}: {code or 'a code put together at run time'}"
        for line, code in raised_codes(path.read_text(encoding="utf-8"))
        if code is None or not ERROR_CODE.fullmatch(code)
    ]
    assert bad == []


def test_error_codes_are_found_where_they_are_raised() -> None:
    text = 'raise Tampered("segment.tampered", "x")\nraise errors.Denied(f"a.{b}", "x")\nraise ValueError("no code")\n'
    assert raised_codes(text) == [(1, "segment.tampered"), (2, None)]


@pytest.mark.parametrize("path", DECODERS, ids=relative)
def test_independent_decoder_imports_nothing_of_ours(path: Path) -> None:
    # Two readings of one specification are evidence only while they share no code.
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import may reach our code"
            imported.add((node.module or "").partition(".")[0])
    assert imported <= sys.stdlib_module_names | {"blake3", "cryptography", "ml_dtypes", "numpy"}


def test_every_layer_is_a_module_or_declared_optional() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(c for c in config["tool"]["importlinter"]["contracts"] if c["id"] == "layers")
    layers = {layer.strip("()") for layer in contract["layers"]}
    present = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert present - layers <= {"__init__", "__main__"}


@pytest.mark.parametrize("package", ["gateway", "client/away"])
def test_a_package_says_where_everything_of_it_is(package: str) -> None:
    said = ast.get_docstring(ast.parse((SOURCE / package / "__init__.py").read_text(encoding="utf-8"))) or ""
    table = "\n".join(line for line in said.splitlines() if line.startswith("    "))
    modules = {path.stem for path in (SOURCE / package).glob("*.py")} - {"__init__"}
    assert modules - set(re.findall(r"\w+", table)) == set()


def test_version_is_stated_once_and_logged() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {config['project']['version']}" in changelog


def test_license_is_the_full_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
