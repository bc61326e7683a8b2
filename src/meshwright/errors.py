"""The one exception for mistakes of the user's; `assert` is for ours."""


class UserError(Exception):
    """A mistake in what the user asked for.

    Its text is one line, or a line for each violation. A line says what, which number, which rule and the fix:

        layout.tensor = 3 does not divide model.heads = 8 (tensor × ulysses must divide the query heads): use 2 or 4

    The command line prints it on stderr, without a traceback, and exits 2.
    """
