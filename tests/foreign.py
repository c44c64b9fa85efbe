"""A kernel as a user of ninetoothed writes it. Kept apart, for ninetoothed copies a module's globals."""


def arrangement(x, y, out):
    return x.tile((16,)), y.tile((16,)), out.tile((16,))


def application(x, y, out):
    out = x * y + 1  # noqa: F841
