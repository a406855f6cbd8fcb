"""The errors a user or a file can cause; each reads as one line and names the way out."""


class MoetraceError(Exception):
    """Anything moetrace cannot go on from; the command line prints it as one line."""


class TraceError(MoetraceError):
    """A source or a trace that is not what it should be.

    The message always has the same three parts, so that nobody has to guess:
    where (file, column, first bad row or step), what is wrong, and the way out.
    """

    def __init__(self, where: str, problem: str, way_out: str) -> None:
        # All three as arguments: an error is rebuilt from them where it comes from another process.
        super().__init__(where, problem, way_out)

    def __str__(self) -> str:
        where, problem, way_out = self.args
        return f"{where}: {problem}; {way_out}"


class WorkspaceError(MoetraceError):
    """A name, a folder or an output that cannot be used as asked."""


class SettingError(MoetraceError):
    """A setting of a predictor, or a selection of layers or steps, that makes no sense."""


class TooShortError(MoetraceError):
    """A trace with too few steps to fit anything."""
