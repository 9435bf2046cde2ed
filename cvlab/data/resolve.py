"""Which data a run uses: the set it names, fetched if that is quick, or its stand-in, said aloud."""

from dataclasses import dataclass
from typing import Any

from cvlab import console
from cvlab.data import datasets
from cvlab.errors import ConfigError, DataError
from cvlab.storage import download
from cvlab.storage.cache import data_root


@dataclass(frozen=True)
class DownloadPolicy:
    """What the user allows: no socket, as long as it takes, no stand-in."""

    offline: bool = False
    patient: bool = False
    no_standin: bool = False

    def __post_init__(self) -> None:
        """Refuse what excludes each other."""
        if self.offline and self.patient:
            raise ConfigError("--offline and --download exclude each other", "give one of them")


def resolve_dataset(block: Any, policy: DownloadPolicy) -> Any:
    """Return the data block with the set that can be used now: `block` itself, or its stand-in.

    `block` has `name`, `standin` and `standin_for`. DataError with the command that helps where neither can be used.
    """
    if block.standin_for is not None or "." in block.name:
        return block
    source = datasets.get(block.name)
    if source.is_builtin or source.ready(data_root()):
        return block
    reason = _try_to_fetch(source, policy)
    if reason is None:
        return block
    help_line = f"`cvlab data fetch {block.name}` gets it"
    if block.standin is None or policy.no_standin:
        raise DataError(f"{block.name} is not in {data_root()}: {reason}", help_line)
    console.info(f"{block.name} is not on the disk ({reason}); using {block.standin} in its place; {help_line}")
    return block.model_copy(update={"name": block.standin, "standin": None, "standin_for": block.name})


def _try_to_fetch(source: datasets.AnySource, policy: DownloadPolicy) -> str | None:
    """Fetch a set if that is allowed and quick; return why it is not there, or None."""
    if policy.offline or not download.allowed():
        return "offline"
    assert source.fetch is not None
    console.info(f"{source.name} is not in {data_root()}, fetching it (--offline does not)")
    try:
        source.fetch(data_root(), None, policy.patient)
    except DataError as error:
        if policy.patient:
            raise
        return error.message
    return None


def describe_data(block: Any) -> str:
    """Say which data a run used, as summary.json does: `scenes10 (stand-in for cifar10)`."""
    return f"{block.name} (stand-in for {block.standin_for})" if block.standin_for else str(block.name)
