"""A bundle from the command line: `python -m gemma_qat_kit.classroom bundle FOLDER "E2B q4_0"`, or `verify FOLDER`."""

import sys
from pathlib import Path

from gemma_qat_kit.classroom.start import damaged
from gemma_qat_kit.errors import KitError


def main(arguments: list[str]) -> int:
    """Make or verify a bundle; return the exit status."""
    verb, *rest = arguments or ["help"]
    try:
        if verb == "bundle" and rest:
            from gemma_qat_kit.classroom.bundle import bundle

            print(bundle(rest[0], rest[1:]))
            return 0
        if verb == "verify" and len(rest) == 1:
            names = damaged(Path(rest[0]).expanduser())
            print("\n".join(f"{name} is damaged or missing" for name in names) or "Every file is as it was made.")
            return 1 if names else 0
    except (KitError, ValueError) as err:
        print(err)
        return 1
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
