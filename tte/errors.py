"""The one exception that a user of tte ever sees: what is wrong, where, which rule, what to do next."""


class TTEError(Exception):
    """A mistake in what the user gave us. Our own bugs are assertions and tracebacks, never this.

    code:  stable, of the form ``TTE-E012``; listed in docs/errors.md
    what:  one sentence, what is wrong
    where: file and line, layer, parameter or operator
    fix:   what to do next
    """

    def __init__(self, code: str, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.code, self.what, self.where, self.fix = code, what, where, fix

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.what}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)
