"""A griffe extension: fence the doctest examples of docstrings, which Markdown would take for quotations."""

import re

from griffe import Extension

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


class Examples(Extension):
    """Fence `>>>` and the lines after it up to a blank one."""

    def on_object(self, *, obj, **kwargs):
        """Change the docstring of an object in place."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(lambda match: f"```pycon\n{match[0]}\n```", obj.docstring.value)
