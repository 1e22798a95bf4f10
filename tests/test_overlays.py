"""An overlay run means nothing unless the older or newer versions really are the ones imported."""

import importlib
import importlib.metadata
import os
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OVERLAYS = runpy.run_path(str(ROOT / "scripts" / "setup.py"))["OVERLAYS"]
NAME = os.environ.get("GQK_OVERLAY")

pytestmark = pytest.mark.skipif(NAME is None, reason="runs when `make test` puts an overlay in front (GQK_OVERLAY)")


@pytest.mark.parametrize("pin", OVERLAYS.get(NAME, ()))
def test_every_pinned_version_of_the_overlay_wins_over_the_environment(pin):
    name, version = pin.split("==")
    assert importlib.metadata.version(name) == version


def test_transformers_is_imported_from_the_overlay():
    module = importlib.import_module("transformers")
    folder = ROOT / ".overlays" / NAME
    assert Path(module.__file__).is_relative_to(folder)
    assert f"transformers=={module.__version__}" in OVERLAYS[NAME]
