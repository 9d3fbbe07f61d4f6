"""Report what this machine offers, from GPUs to disks, and what will be slow or fail on it.

python recipes/doctor.py          (or: ds-embed doctor)
"""

from dataclasses import dataclass

from ds_embed.job.ranks import run_recipe
from ds_embed.settings import parse_arguments
from ds_embed.settings.fields import setting


@dataclass
class DoctorArguments:
    cache_dir: str = setting("folder for tokenized data; its free space is reported", "~/.cache/ds_embed")
    output_dir: str = setting("folder for runs; its free space is reported", ".")


def main() -> None:
    (arguments,) = parse_arguments(DoctorArguments)
    from ds_embed.tools.doctor import examine

    print(examine(arguments.cache_dir, arguments.output_dir))


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
