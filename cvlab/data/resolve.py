"""Resolve a run's data set: use it if it is present, download it if that is quick, else use its fallback and warn."""

from dataclasses import dataclass
from typing import TypeVar

from cvlab import console
from cvlab.config.schema import DataConfig
from cvlab.data import datasets
from cvlab.errors import ConfigError, DataError
from cvlab.storage.cache import data_root

Block = TypeVar("Block", bound=DataConfig)


@dataclass(frozen=True)
class DownloadPolicy:
    """What the command line allows.

    Attributes:
        offline: Open no socket.
        wait: Wait for a download as long as it takes.
        no_fallback: Raise DataError instead of using the fallback.
    """

    offline: bool = False
    wait: bool = False
    no_fallback: bool = False

    def __post_init__(self) -> None:
        """Reject options that exclude each other."""
        if self.offline and self.wait:
            raise ConfigError("--offline and --download exclude each other", "give one of them")


def resolve_dataset(block: Block, policy: DownloadPolicy) -> Block:
    """Return the data block with a data set that can be used now: `block` itself, or one that names its fallback.

    Raises DataError with the command that helps if neither can be used.
    """
    if block.fallback_for is not None or "." in block.name:
        return block
    for name in block.names:
        source = datasets.get(name)
        reason = None if source.is_builtin or source.ready(data_root()) else _try_to_fetch(source, policy)
        if reason is None:
            continue
        hint = f"`cvlab data fetch {name}` gets it"
        if block.fallback is None or policy.no_fallback:
            raise DataError(f"{name} is not in {data_root()}: {reason}", hint)
        console.info(f"warning: {name} is not on the disk ({reason}); falling back to {block.fallback}; {hint}")
        return block.on_fallback()
    return block


def _try_to_fetch(source: datasets.AnySource, policy: DownloadPolicy) -> str | None:
    """Fetch a data set if that is allowed and quick; return why it is missing, or None if it is there now."""
    from cvlab.storage import download  # with http and ssl, which a configuration is loaded without

    if policy.offline or not download.is_online():
        return "offline"
    assert source.fetch is not None
    console.info(f"downloading {source.name} to {data_root()}; --offline skips this")
    try:
        source.fetch(data_root(), None, policy.wait)
    except DataError as error:
        if policy.wait:
            raise
        return error.message
    return None


def describe_data(block: DataConfig) -> str:
    """Return the `data` entry of summary.json, for example `scenes10 (fallback for cifar10)`."""
    names = " + ".join(block.names)
    return f"{names} (fallback for {block.fallback_for})" if block.fallback_for else names
