"""The job: what all recipes that run on several ranks share."""

from dataclasses import dataclass

from ds_embed.settings.checks import at_least
from ds_embed.settings.fields import setting


@dataclass(kw_only=True)
class JobArguments:
    rank_timeout_seconds: float = setting(
        "seconds after which a rank that is stopped, or whose host is silent, ends the job; 0: never. A rank that died "
        "ends it at once; one that is busy does not, however long",
        default=60.0,
    )
    stall_timeout_seconds: float = setting(
        "seconds after which a rank that stands while others wait for it ends the job; 0: never", default=540.0
    )

    def __post_init__(self):
        at_least(self, 0, "rank_timeout_seconds", "stall_timeout_seconds")
