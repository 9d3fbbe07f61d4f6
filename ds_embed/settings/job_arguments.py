"""The job: settings shared by all recipes that run on several ranks."""

from dataclasses import dataclass

from ds_embed.settings.fields import Settings, setting


@dataclass(kw_only=True)
class JobArguments(Settings):
    rank_timeout_seconds: float = setting(
        "end the job if a rank is stopped, or its host does not respond, for this many seconds; 0 disables this. A rank "
        "that dies ends the job at once; a busy rank never does",
        default=60.0,
        at_least=0,
    )
    stall_timeout_seconds: float = setting(
        "end the job if a rank makes no progress for this many seconds while others wait for it; 0 disables this",
        default=540.0,
        at_least=0,
    )
