"""shoal's launcher: decides a run completely, writes it down as a plan, then carries it out."""

__version__ = "0.1.0"
