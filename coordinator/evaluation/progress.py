"""A bar on stderr while somebody looks at it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from tqdm import tqdm


@dataclass(frozen=True, slots=True)
class Progress:
    """What is being done, for a bar; drawn only where stderr is a terminal."""

    what: str

    def over(self, total: int) -> tqdm[None]:
        """Return a bar of ``total`` prompts, to be used as a context."""
        shown = sys.stderr.isatty()
        return tqdm(
            total=total, desc=self.what, unit="prompt", disable=not shown, dynamic_ncols=True
        )
