"""Whether the Python files of a run directory, which `train`, `eval`, `resume` and `export` run, are this user's.

`env.json` has a signature of these files, with a key that only this user has on this machine. It does not hold for a
directory that somebody else made, nor for one whose files were changed.
"""

import contextlib
import hashlib
import hmac
import importlib.machinery
import os
import secrets
from pathlib import Path

from cvlab import portability
from cvlab.config import strict_yaml
from cvlab.errors import CvlabError, RunDirError
from cvlab.runs.find import config_path
from cvlab.runs.records import read_json
from cvlab.runs.user_code import user_files
from cvlab.storage import regular_files

KEY_BYTES = 32
MAX_CODE_BYTES = 64 * 2**20  # of one file
SIGNATURE = "code_signature"  # in env.json


def _key_path() -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "cvlab" / "signing-key"


def _key() -> bytes | None:
    """Return this user's key, which is created if missing; None if there is no place for it."""
    path = _key_path()
    with contextlib.suppress(OSError, RuntimeError):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _create_key(path)
        key = regular_files.read_bytes(path, KEY_BYTES)
        return key if len(key) == KEY_BYTES else None
    return None


def _create_key(path: Path) -> None:
    """Write a new key; if another process is faster, its key stays."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a disk without hard links
            portability.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _code_files(path: Path) -> list[Path]:
    """Return the files whose code a run may import: those that it names, and all in its directory that Python takes."""
    config = strict_yaml.read(config_path(path)).value
    suffixes = tuple(importlib.machinery.all_suffixes())
    inside = [file for file in path.rglob("*") if file.name.endswith(suffixes)]
    trials = path / "trials"  # they have signatures of their own
    return [*(path / file for file in user_files(config)), *(file for file in inside if trials not in file.parents)]


def sign(path: Path) -> str | None:
    """Return the signature of the Python files of a run directory; None without a key, or if they cannot be read."""
    key = _key()
    if key is None:
        return None
    digest = hmac.new(key, digestmod=hashlib.sha256)
    try:
        for file in sorted(set(_code_files(path))):
            content = regular_files.read_bytes(file, MAX_CODE_BYTES)
            name = os.fsencode(os.path.relpath(file, path))
            digest.update(f"{len(name)} {len(content)} ".encode() + name + content)
    except (OSError, CvlabError):
        return None
    return digest.hexdigest()


def require_trust(path: Path, is_trusted: bool) -> None:
    """Raise RunDirError if a run directory has code that was not signed on this machine, unless it is trusted."""
    config = strict_yaml.read(config_path(path)).value
    names = [str(file) for file in user_files(config)]
    base = config.get("base") if isinstance(config, dict) else None
    if isinstance(base, dict):  # the configuration is that of a sweep
        base = base.get("from")
    if base is not None and not is_trusted:  # the files of `base` may name code, which no signature covers
        raise RunDirError(
            f"{config_path(path)}: it refers to {base!r:.80}, while the configuration of a run is self-contained",
            "read that, then use --trust; or give the file another name",
        )
    if is_trusted or not names:
        return
    recorded, signature = read_json(path / "env.json").get(SIGNATURE), sign(path)
    if signature is None or recorded != signature:
        raise RunDirError(
            f"{path}: its code ({names[0]}) was not written by a run of yours on this machine, or was changed since",
            "read it, then use --trust to run it; to resume on changed code, --allow-changes",
        )


def require_trust_of(reference: str, is_trusted: bool) -> None:
    """Raise RunDirError if a run directory, or the configuration in one, has code of others that is not trusted."""
    path = Path(reference)
    if os.path.lexists(path / "config.yaml"):
        require_trust(path, is_trusted)
    elif path.name == "config.yaml" and any(
        os.path.lexists(path.parent / name) for name in ("env.json", "status.json")
    ):
        require_trust(path.parent, is_trusted)
