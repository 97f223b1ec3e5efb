"""Reports of what a run needs, did, and loses in a merge: as text, and as HTML in a notebook."""

from minilora.reports.merges import merge_report as merge_report
from minilora.reports.planning import plan as plan
