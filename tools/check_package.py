"""Build the sdist and the wheel, and check them: ``python tools/check_package.py DIRECTORY``. The wheel stays there.

The wheel has the same bits wherever it is built: in two directories, and from the sdist. Wheel and sdist hold the files
that are expected, and no others.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
EPOCH = "1767225600"  # 2026-01-01: the time of all files in a wheel
PACKAGES = {"portable_gpt2": "portable_gpt2", "backends": "portable_gpt2_backends"}
LARGEST = 10_000_000  # bytes


def run(*command: str | Path) -> str:
    """Run a command, and return its stdout."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def tracked() -> list[str]:
    """Return the files that git tracks."""
    return run("git", "-C", ROOT, "ls-files").splitlines()


def copy(to: Path) -> Path:
    """Copy the tracked files, so that nothing else of the checkout can get into a package."""
    for name in tracked():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    return to


def build(kind: str, source: Path, to: Path) -> Path:
    """Build a ``wheel`` or an ``sdist``, and return the file."""
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", to, source)
    [file] = to.iterdir()
    return file


def expect(what: str, found: set[str], expected: set[str]) -> None:
    """Exit if two sets of names differ."""
    if found != expected:
        sys.exit(f"{what}: not expected: {sorted(found - expected)}; missing: {sorted(expected - found)}")


def main(room: Path) -> None:
    """Build and check everything."""
    first, second = copy(room / "first"), copy(room / "elsewhere" / "second")
    sdist = build("sdist", first, room / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(room / "unpacked", filter="data")
        in_sdist = {member.name for member in archive if member.isfile()}
    [unpacked] = (room / "unpacked").iterdir()
    wheel = build("wheel", first, room / "wheel")
    for source, name in ((second, "another directory"), (unpacked, "the sdist")):
        other = build("wheel", source, room / f"wheel of {name}")
        if other.read_bytes() != wheel.read_bytes():
            sys.exit(f"the wheel has other bits if it is built from {name}")
    code = {name for name in tracked() if name.split("/")[0] in PACKAGES}
    with zipfile.ZipFile(wheel) as archive:
        names = {member.filename for member in archive.infolist()}
        [about] = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = archive.read(f"{about}/METADATA").decode()
    own = {f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")}
    own.add(f"{about}/licenses/LICENSE")
    expect("wheel", names, own | {"/".join([PACKAGES[n.split("/")[0]], *n.split("/")[1:]]) for n in code})
    texts = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "MANIFEST.in"}
    left = {name.partition("/")[2] for name in in_sdist}
    made = {name for name in left if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    expect("sdist", left, code | texts | made)
    for path in ("file:", str(ROOT), str(Path.home()) + "/", "index-url"):
        if path in metadata:
            sys.exit(f"the metadata holds {path}")
    if wheel.stat().st_size > LARGEST:
        sys.exit(f"the wheel has {wheel.stat().st_size:,} bytes, more than {LARGEST:,}")
    print(run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel), end="")
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {len(names)} files, the same bits from three sources")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
