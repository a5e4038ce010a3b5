"""Print docs/config_fields.md: what each field of a config file means here.

python -m mamba_lm.formats > docs/config_fields.md
"""

from mamba_lm.formats import state_spaces, transformers
from mamba_lm.formats.fields import Role, Table

_PAGE = """# Config fields

What the loader makes of each field of a model's `config.json`, or of a config file for random
weights. A field that is not in these tables is refused by name, since it may change what the model
computes. This page is printed by `python -m mamba_lm.formats`, from the tables that the loader
reads.

| role | meaning |
|---|---|
| used | it decides what the model computes; another value than the accepted ones is refused |
| random weights only | it decides how random weights start; any value with weights from files |
| describes only | it changes no result here; any value is accepted |
| refused | any value but null is refused |

## `transformers`: Mamba and Falcon-Mamba

All fields of the classes `MambaConfig` and `FalconMambaConfig` of transformers 5.17 to 5.23, and
what earlier versions and conversions have left in public models.

{mamba}

Falcon-Mamba has all of these, and:

{falcon}

## `mamba_ssm`, as of the state-spaces models

{config}

Fields of `ssm_cfg`:

{ssm}

Fields of `initializer_cfg`:

{initializer}
"""


def page() -> str:
    """The page as it is in docs/."""
    own = {n: f for n, f in transformers.FALCON_MAMBA.items() if n not in transformers.MAMBA}
    tables = {
        "mamba": transformers.MAMBA,
        "falcon": own,
        "config": state_spaces.CONFIG,
        "ssm": state_spaces.SSM,
        "initializer": state_spaces.INITIALIZER,
    }
    return _PAGE.format(**{name: _rows(table) for name, table in tables.items()})


def _rows(table: Table) -> str:
    by_role = sorted(table.items(), key=lambda item: list(Role).index(item[1].role))
    lines = (f"| `{n}` | {f.role} | {f.accepted} | {f.remark} |" for n, f in by_role)
    return "\n".join(("| field | role | accepted | |", "|---|---|---|---|", *lines))


if __name__ == "__main__":
    print(page(), end="")
