"""The demo's story: steps in order, each of which says what it shows and adds its figures."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strongroom.cli.demo_door import DoorSteps
from strongroom.cli.demo_stage import ANA, KIM, OWNER, broken
from strongroom.cli.output import number, seconds, size
from strongroom.cli.weights import problem_line
from strongroom.errors import BackendError, IntegrityError

if TYPE_CHECKING:
    from strongroom.cli.demo_infer import Inference

_ROUNDS = 5  # timed loads, after one that warms up
_HUNG = 10 * 60  # seconds after which a child is given up


class Story(DoorSteps):
    """One telling. Each step prints what it shows and adds its figures."""

    def tell(self) -> dict[str, Any]:
        """All steps in order; the figures of each by its name."""
        self._tell("Everything below really happens, on a throw-away room. $ begins a command.")
        steps: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
            ("init", "A room", self.init),
            ("put", "The model goes in", self.put),
            ("thief", "What somebody sees who steals the store", self.thief),
            ("verify", "Every byte is accounted for", self.verify),
            ("denied", "Nobody just takes them", self.denied),
            ("approved", "She asks, and two others agree", self.approved),
            ("run", "It answers, straight out of the room", self.run),
            ("revoked", "The lease ends", self.revoked),
            ("log", "The log of it all", self.log),
            ("holders", "No two holders get the same bytes", self.holders),
            ("tamper", "One flipped byte", self.tamper),
            ("speed", "What it costs to read", self.speed),
            ("copies", "Two partners get a copy each", self.copies),
            ("leak", "One of them leaks", self.leak),
            ("together", "Both of them leak, together", self.together),
        ]
        if self.original.kind == "smollm2":  # a model that writes
            steps += [
                ("served", "Everybody else gets only inference", self.served),
                ("stolen", "Somebody steals the last layer through the door", self.stolen),
                ("budget", "Every bit is counted", self.budget),
                ("covert", "A server that smuggles", self.covert),
            ]
        with self.serving():
            for name, title, step in steps:
                self._heading(title)
                self.figures[name] = step()
        self._heading("What this does not protect against")
        self._tell(
            "Whoever holds a key bundle, or is root where one is in use, can copy the weights: the copy names them, "
            "no more than that. A model that is trained anew on another's answers carries no mark."
        )
        self._tell(
            "And whoever has this folder with its key file has the room, and can be Ana, Ben and Eva in turn: their "
            "keys lie in it. In your own folder you are the custodian; to keep them apart takes a server: strongroom "
            "serve."
        )
        return self.figures

    # -- the steps -----------------------------------------------------------------------------------------------

    def init(self) -> dict[str, Any]:
        """A room with a key file and recovery shares."""
        from strongroom.client import Room

        self._tell(f"The original: {self.original.title}, {size(_bytes(self.original.folder))}, {self.original.where}.")
        self._typed(f"init --recovery 2of3 --owner {OWNER}")
        room, shares = Room.init(self.folder, recovery=(2, 3), owner=OWNER, custody="team")
        with room:
            room.recovery_drill(shares[1:])
        self._tell("A key file, a database, a store, and 3 recovery shares. Two of them were just tried: they open it.")
        self._tell("And a log, in which everything that follows is written down; its policy is that of a team.")
        return {"recovery": "2of3", "drill": True, "custody": "team"}

    def put(self) -> dict[str, Any]:
        """Encrypt and mark."""
        self._typed(f"put {self.original.folder} {self.name}")
        begun = time.perf_counter()
        with self._room() as room, self.output.progress("put") as progress:
            result = room.put(self.original.folder, self.name, progress=progress)
        took = time.perf_counter() - begun
        self._tell(
            f"{size(result.bytes)} became {number(result.segments)} encrypted segments in {seconds(took)}; "
            f"{size(result.stored_bytes)} are stored."
        )
        self._tell(
            f"{number(result.positions)} positions hold two variants, A and B, that differ by an invisible mark."
        )
        return {**result.as_json(), "seconds": round(took, 3)}

    def thief(self) -> dict[str, Any]:
        """Look for plaintext in every byte of the room's folder."""
        objects = sorted(
            (path for path in (self.folder / "store").rglob("*") if path.is_file()), key=_size, reverse=True
        )
        for path in objects[:3]:
            self._tell(f"{self._short(path)}   {size(_size(path))}")
        if len(objects) > 3:
            self._tell(f"… and {len(objects) - 3} more objects: random names, and sizes")
        needles = self._needles()
        here = _found(self.folder, needles)
        there = _found(self.original.folder, needles)
        if here or there != len(needles):
            raise broken("plaintext in the room, or not found in the original", {"here": here, "there": there})
        bits = _entropy(objects)
        self._tell(
            f"{bits:.4f} bits of entropy a byte, of 8. Searched for in all {size(_bytes(self.folder))} of the room:"
        )
        self._tell(
            f"tensor names, the architecture, 32-byte pieces of weights: {here} found. (In the original: {there}.)"
        )
        return {
            "objects": len(objects),
            "entropy_bits": bits,
            "needles": len(needles),
            "found": here,
            "found_in_original": there,
        }

    def verify(self) -> dict[str, Any]:
        """Hashes only, then with both variants decrypted."""
        self._typed(f"verify {self.name} --deep")
        with self._room() as room:
            begun = time.perf_counter()
            report = room.verify(self.ref)
            shallow = time.perf_counter() - begun
            deep = room.verify(self.ref, deep=True)
            took = time.perf_counter() - begun - shallow
        if not (report.ok and deep.ok):
            raise broken("verify found problems in a room that nobody has touched", deep.as_json())
        self._tell(f"{number(report.segments)} segments match what the room signed ({seconds(shallow)}).")
        self._tell(f"Decrypted, with the marks of A and B taken out again: bit for bit the original ({seconds(took)}).")
        return {**deep.as_json(), "seconds": round(shallow, 3), "deep_seconds": round(took, 3)}

    def run(self) -> dict[str, Any]:
        """A child process with Ana's key bundle answers; its outputs against the original's."""
        from strongroom.cli import demo_infer

        kind = self.original.kind
        self._typed(f"run {self.name} --as {ANA} -- python evaluate.py")
        found = demo_infer.decode(self._child(["-m", "strongroom.cli.demo_infer", kind, self.name]))
        expected = self._original_inference()
        figures = demo_infer.compare(kind, expected, found)
        self._tell(f"Q: {demo_infer.QUESTION[kind]}")
        self._tell(f"A: {found.answer}" + ("" if figures["same_answer"] else f"   (the original: {expected.answer})"))
        written = found.facts["disk_bytes_written"]
        proof = "" if written is None else f" By the kernel's count it wrote {size(written)} to disks."
        self._tell(f"It ran in a child process with Ana's key bundle, and no room and no file.{proof}")
        self._tell(_compared(kind, figures))
        release = self._newest("release")
        if (release["by"], release["body"]["lease"]) != (ANA, self.figures["approved"]["lease"]):
            raise broken("the log does not have the release that there was", release)
        self._tell(
            f"First it was recorded, as entry {release['index']}; her side took the keys only with the proof that they "
            "are in the log."
        )
        answers = {"answer": found.answer, "original_answer": expected.answer}
        return {**figures, **found.facts, **answers, "entry": release["index"]}

    def holders(self) -> dict[str, Any]:
        """Two principals, two code words, two images."""
        import numpy as np

        self._add(KIM, "researcher")
        readers = []
        for principal in (ANA, KIM):
            self._lease(principal)
            with self._room(principal) as theirs:
                readers.append(theirs.reader(self.ref))
        self._tell("Kim asks for a lease, and Ana for a new one; Ben and Eva approve both.")
        words = [np.unpackbits(np.frombuffer(reader.bundle.word, np.uint8), bitorder="little") for reader in readers]
        count = readers[0].bundle.positions
        differ = words[0][:count] != words[1][:count]
        images = [np.frombuffer(reader.read_all(), np.uint8) for reader in readers]
        bytes_differ = int(np.count_nonzero(images[0] != images[1]))
        for principal, word in zip(("ana", "kim"), words, strict=True):
            letters = "".join("AB"[bit] for bit in word[: min(count, 48)])
            self._tell(f"{principal}: {letters}…")
        self._tell(
            f"Their bundles open different variants at {number(int(differ.sum()))} of {number(count)} positions; "
            f"{number(bytes_differ)} bytes of the two models differ."
        )
        self._tell(
            "Neither has a key for the other's variants, so neither can make an unmarked copy, whatever program they "
            "use: what leaks carries its holder's code word."
        )
        return {"positions": count, "positions_differ": int(differ.sum()), "bytes_differ": bytes_differ}

    def tamper(self) -> dict[str, Any]:
        """Flip a byte in the store, look, and put it back."""
        pack = self._common_pack()
        offset = _size(pack) // 3
        with _flipped(pack, offset):
            self._tell(f"Byte {number(offset)} of {self._short(pack)} is flipped.")
            self._typed(f"verify {self.name}")
            with self._room(ANA) as room:
                report = room.verify(self.ref)
                if report.ok:
                    raise broken("verify did not see a flipped byte", report.as_json())
                for problem in report.problems:
                    self._tell(problem_line(problem))
                refused = self._refused(
                    IntegrityError, lambda: room.load(self.ref).read(), otherwise="a damaged version was loaded"
                )
        with self._room() as again:
            whole = again.verify(self.ref).ok
        if not whole:
            raise broken("the byte was put back, and verify is not content", {})
        self._tell("The byte is put back; verify is content again.")
        return {
            "problems": [problem.as_json() for problem in report.problems],
            "refused": refused.code,
            "whole_again": whole,
        }

    def speed(self) -> dict[str, Any]:
        """Whole-model loads, ours and safetensors' full copy in turn."""
        from safetensors import safe_open

        with self._room(ANA) as room:
            weights = room.load(self.ref)

        def ours() -> None:
            weights.torch()

        def plain() -> None:
            with safe_open(self.original.weights, framework="pt") as file:
                copies = [file.get_tensor(name).clone() for name in file.keys()]  # noqa: SIM118 - it is no mapping
                del copies

        times: dict[str, list[float]] = {"ours": [], "safetensors": []}
        for _ in range(1 + _ROUNDS):
            for name, load in (("ours", ours), ("safetensors", plain)):
                begun = time.perf_counter()
                load()
                times[name].append(time.perf_counter() - begun)
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        ratio = medians["ours"] / medians["safetensors"]
        self._tell(f"The whole model from the room, verified, decrypted, marked: {seconds(medians['ours'])}.")
        self._tell(
            f"A full copy of the plain safetensors file: {seconds(medians['safetensors'])}. "
            f"Medians of {_ROUNDS}; the ratio is {ratio:.2f}."
        )
        return {"seconds": medians["ours"], "safetensors_seconds": medians["safetensors"], "ratio": ratio}

    # -- inside --------------------------------------------------------------------------------------------------

    def _common_pack(self) -> Path:
        """The file of a pack that every holder reads all of: of marked packs each reads one variant."""
        from strongroom.formats.bundle import KeyBundle
        from strongroom.storage.blobs import open_blobs
        from strongroom.storage.image import SealedImage

        with self._room(ANA) as room:
            url, bundle = room.grant(self.ref)
        manifest = SealedImage.open(open_blobs(url), KeyBundle.decode(bundle)).manifest
        return self.folder / "store" / manifest.common_packs[0].name

    def _short(self, path: Path) -> str:
        """An object's path in the room, its random name shortened."""
        return f"{path.parent.relative_to(self.folder)}/{path.name[:16]}…"

    def _child(self, arguments: list[str]) -> bytes:
        room = ["--room", str(self.folder), "--as", ANA]
        line = [sys.executable, "-m", "strongroom.cli", *room, "run", self.name, "--", sys.executable, *arguments]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        try:
            child = subprocess.run(line, capture_output=True, env=environment, timeout=_HUNG, check=False)
        except subprocess.TimeoutExpired:
            raise BackendError("demo.child", f"the child had not answered after {_HUNG} seconds") from None
        if child.returncode:
            last = child.stderr.decode("utf-8", "replace").strip().splitlines()[-3:]
            raise BackendError("demo.child", f"the child ended with {child.returncode}: {' / '.join(last)}")
        return child.stdout

    def _original_inference(self) -> Inference:
        import transformers

        from strongroom.cli import demo_infer

        demo_infer.quiet()
        auto = transformers.AutoModelForCausalLM if self.original.kind == "smollm2" else transformers.AutoModel
        model = auto.from_pretrained(self.original.folder, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.original.folder, local_files_only=True)
        return demo_infer.infer(self.original.kind, model, tokenizer)

    def _needles(self) -> dict[str, bytes]:
        """What a thief would look for: names, the architecture, and pieces of the weights from all over the file."""
        from safetensors import safe_open

        with safe_open(self.original.weights, framework="np") as file:
            names = sorted(file.keys())
        needles = {f"name {name}": name.encode() for name in (names[0], names[len(names) // 2], names[-1])}
        architecture = "LlamaForCausalLM" if self.original.kind == "smollm2" else "BertModel"
        needles["architecture"] = architecture.encode()
        length = _size(self.original.weights)
        with self.original.weights.open("rb") as weights:
            for part in range(1, 9):
                weights.seek(length * part // 9 // 64 * 64)
                needles[f"weights {part}"] = weights.read(32)
        return needles


def _compared(kind: str, figures: dict[str, Any]) -> str:
    if kind == "minilm":
        return f"Against the original's embeddings: cosine at least {figures['min_cosine']:.6f}."
    return (
        f"Against the original, on {figures['tokens']} tokens of text: the same next token for "
        f"{figures['top1_agreement']:.0%}, logits off by {figures['mean_difference']:.1e} on average, KL divergence "
        f"{figures['kl_nats']:.1e} nats."
    )


def _size(path: Path) -> int:
    return path.stat().st_size


def _bytes(folder: Path) -> int:
    return sum(_size(path) for path in folder.rglob("*") if path.is_file())


def _found(folder: Path, needles: dict[str, bytes]) -> int:
    """How many of `needles` occur in any file below `folder`."""
    found: set[str] = set()
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found |= {name for name, needle in needles.items() if needle in content}
    return len(found)


def _entropy(objects: list[Path]) -> float:
    """Shannon's, of single bytes, in bits."""
    import numpy as np

    counts = np.zeros(256, np.int64)
    for path in objects:
        counts += np.bincount(np.fromfile(path, np.uint8), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


@contextlib.contextmanager
def _flipped(path: Path, offset: int) -> Iterator[None]:
    """One byte of a file inverted, and put back."""
    mode = path.stat().st_mode & 0o7777

    def flip() -> None:
        path.chmod(mode | 0o200)
        with path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0xFF]))
        path.chmod(mode)

    flip()
    try:
        yield
    finally:
        flip()
