"""From the rows of a dump to blocks of whole steps: tables, sorting, merging, selecting."""
