"""The package's docstring is how somebody finds their way in it: it names every module."""

import re
from pathlib import Path

import pytest

import strongroom.client.away
import strongroom.gateway


@pytest.mark.parametrize("package", [strongroom.gateway, strongroom.client.away])
def test_every_module_is_in_the_docstring_of_its_package(package):
    modules = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {"__init__"}
    said = set(re.findall(r"\w+", package.__doc__))
    assert modules <= said
