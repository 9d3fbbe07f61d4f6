"""The job: what all recipes that run on several ranks share."""

from dataclasses import dataclass

from ds_embed.settings.fields import Settings, setting


@dataclass(kw_only=True)
class JobArguments(Settings):
    rank_timeout_seconds: float = setting(
        "seconds after which a rank that is stopped, or whose host is silent, ends the job; 0: never. A rank that died "
        "ends it at once; one that is busy does not, however long",
        default=60.0,
        at_least=0,
    )
    stall_timeout_seconds: float = setting(
        "seconds after which a rank that stands while others wait for it ends the job; 0: never",
        default=540.0,
        at_least=0,
    )
