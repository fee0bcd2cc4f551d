"""Files of the results of a validation."""

from __future__ import annotations

from pathlib import Path

from cldsde.errors import SettingError, require
from cldsde.files import check_target, new_folder
from cldsde.messages import in_words

from .plain import canvas
from .posterior_suite import PosteriorReport
from .report import TABLE, Report, earlier_files

AnyReport = Report | PosteriorReport


class ReportFiles:
    """Files of a report: all numbers in ``json``; a table and plots in the folder ``out``.

    An error of one does not keep the other from being written. Table and plots of an earlier report
    are removed with ``overwrite``, and are an error without it.
    """

    def __init__(
        self, json: Path | None = None, out: Path | None = None, *, overwrite: bool = False
    ) -> None:
        self._json, self._out, self._overwrite = json, out, overwrite
        self._warned = False

    def check(self) -> None:
        """Make the folder; leave nothing behind and raise if it or a file cannot be written."""
        key, out = "out", self._out
        msg = "needs `out`, the folder of the earlier validation"
        require(out is not None or not self._overwrite, "overwrite", msg)
        if out is not None:
            canvas(1, 1)  # raises an error without matplotlib
        try:
            msg = f"must be a folder, new or there already; {out} is a file"
            require(out is None or not out.is_file(), key, msg)
            with new_folder(out or Path()):
                if out is not None:
                    check_target(out / TABLE)
                    msg = f"{out} holds an earlier validation; name another folder, or set "
                    require(self._overwrite or not earlier_files(out), key, f"{msg}`overwrite`")
                key = "json"
                if self._json is not None:
                    check_target(self._json)
        except OSError as error:
            raise SettingError(key, f"cannot be written: {error}") from error

    def save(self, report: AnyReport) -> None:
        """Write the numbers so far; raise a SettingError the first time that this fails."""
        if self._json is None or self._warned:
            return
        try:
            report.write_json(self._json)
        except OSError as error:
            self._warned = True
            raise SettingError("json", f"cannot be written now: {error}") from error

    def finish(self, report: AnyReport) -> list[SettingError]:
        """Write all files; return the errors."""
        plots = report.write_plots if isinstance(report, Report) else None
        files = ("json", report.write_json, self._json), ("out", plots, self._out)
        errors = []
        for key, write, file in files:
            try:
                if write is not None and file is not None:
                    write(file)
            except Exception as error:  # noqa: BLE001 the other file must still be written
                errors.append(SettingError(key, f"cannot be written: {in_words(error)}"))
        return errors
