"""What every test file shares."""

from importlib.metadata import PackageNotFoundError, version

SHOWN = ("torch", "transformers", "huggingface_hub", "tokenizers", "xllamacpp", "numpy", "ipywidgets", "ipykernel")


def pytest_report_header():
    """Say on which versions this run really is, since `make test` runs on several."""
    return "versions: " + ", ".join(f"{name} {_version(name)}" for name in SHOWN)


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
