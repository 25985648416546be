"""Say how many megabytes the packages of this environment take, and exit with 1 where they are over a limit.

    python tools/installed_size.py [LIMIT]

Counted are the files that the packages bring, in megabytes of a million bytes, without pip and setuptools, which came
before them, and without bytecode, which pip makes and uv does not.
"""

import sys
from importlib.metadata import Distribution, distributions

NOT_OURS = {"pip", "setuptools"}


def size(package: Distribution) -> int:
    """The bytes of a package's files."""
    places = [package.locate_file(file) for file in package.files or [] if file.suffix != ".pyc"]
    return sum(place.stat().st_size for place in places if place.is_file())  # type: ignore[attr-defined]


if __name__ == "__main__":
    sizes = {name: size(package) for package in distributions() if (name := package.metadata["Name"]) not in NOT_OURS}
    total = sum(sizes.values()) / 1e6
    largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:6]
    print(f"{total:.0f} MB, of which " + ", ".join(f"{name} {sizes[name] / 1e6:.0f}" for name in largest))
    if len(sys.argv) > 1 and total > float(sys.argv[1]):
        sys.exit(f"this is over {sys.argv[1]} MB: does a plain install need all of it?")
