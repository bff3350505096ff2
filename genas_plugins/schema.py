"""``python -m genas_plugins.schema MODULE:NAME``: the JSON schema of a file of settings, for editors.

Those of the files that come with the package are in ``configs/schemas``, and the files name them in their first lines.
"""

import argparse
import importlib
import json
import re
import sys

from pydantic import TypeAdapter

__all__ = ["schema_text"]


def schema_text(place: str) -> str:
    """The text of the schema of a type, given as its module and name."""
    module, _, name = place.partition(":")
    schema = TypeAdapter(getattr(importlib.import_module(module), name)).json_schema()
    # An empty configuration is none.
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "minProperties": 1}
    # Titles only repeat names, and editors show docstrings but do not follow their references.
    text = re.sub(r'"title": "[^"]*", |, "title": "[^"]*"', "", json.dumps(schema))
    return re.sub(r":\w+:`([^`]+)`", r"``\1``", text) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the JSON schema of a file of settings, for editors.")
    parser.add_argument("type", help="module and name, for instance genas_plugins.experiment.config:Experiment")
    sys.stdout.write(schema_text(parser.parse_args().type))
