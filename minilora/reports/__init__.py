"""What a run will need, what a merge keeps, what a run did: as text, and as tables and pictures in a notebook."""

from minilora.reports.merges import merge_report as merge_report
from minilora.reports.planning import plan as plan
