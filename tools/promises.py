"""Compare the installed versions with the versions that pyproject.toml promises.

``python tools/promises.py lowest jax testing`` is for an environment of the lowest versions, with the extras jax and
testing. It prints each promised package with its version. It fails if a promise is lower than the lowest version that
could be installed. ``newest`` also prints which newer versions exist, and which package excludes them.
"""

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def promises(project: dict, extras: list[str]) -> dict[str, Requirement]:
    """Return the requirements of a project, with those of some extras, by the name of the package."""
    found = {}
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            found |= promises({**project, "dependencies": []}, sorted(requirement.extras))
        elif requirement.marker is None or requirement.marker.evaluate():
            found[canonicalize_name(requirement.name)] = requirement
    return found


def broken(requirement: Requirement, version: str) -> bool:
    """Return whether a promise is lower than the lowest version that could be installed.

    A promise of 0.6 is kept by 0.6, 0.6.0 and 0.6.1: the first version of a series need not be its first number.
    """
    [bound] = [each.version for each in requirement.specifier if each.operator == ">="]
    return not f"{version}.".startswith(f"{bound}.")


def excluded_by(name: str, version: str) -> list[str]:
    """Return the requirements of installed packages that exclude a version of a package."""
    return [
        f"{distribution.metadata['Name']} needs {requirement.name}{requirement.specifier}"
        for distribution in importlib.metadata.distributions()
        for requirement in map(Requirement, distribution.requires or [])
        if canonicalize_name(requirement.name) == name
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
        and not requirement.specifier.contains(version, prereleases=True)
    ]


def main(kind: str, extras: list[str]) -> None:
    """Print the table, and exit with a message if a promise is broken."""
    found = promises(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"], extras)
    versions = {name: importlib.metadata.version(name) for name in found}
    newer = {}
    if kind == "newest":
        command = ["uv", "pip", "list", "--python", sys.executable, "--outdated", "--format", "json"]
        listed = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        newer = {canonicalize_name(each["name"]): each["latest_version"] for each in listed}
    print(f"Python {sys.version.split()[0]}, {kind} versions:")
    for name, requirement in found.items():
        line = f"  {requirement.name}{requirement.specifier}: {versions[name]}"
        if name in newer:
            reasons = "; ".join(excluded_by(name, newer[name])) or "it has no wheel for this environment"
            line += f" (not {newer[name]}: {reasons})"
        print(line)
    if kind == "lowest" and (wrong := [name for name in found if broken(found[name], versions[name])]):
        said = ", ".join(f"{found[name]} (lowest possible: {versions[name]})" for name in wrong)
        sys.exit(f"pyproject.toml promises too much; raise these lower bounds: {said}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
