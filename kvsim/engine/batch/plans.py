"""What a step of a sequence amounts to: the derived plans of a policy as flat arrays, and their evaluation.

The functions are those of `kvsim.plans.derive.Piece` over arrays: they find the piece whose conditions hold at some
token counts and multiply its matrix by its monomials.
"""

import numpy as np

from kvsim.engine.state.cluster import NOBODY, WANT_PLAN, Detour, Ints, Plans, Record

DECODE, PREFILL = 0, 1  # inputs: prompt and generated tokens; prompt, past and new tokens
INPUTS = (2, 3)
NEVER = 1 << 30  # later than any step
VALUES, BASIS, RATES = range(3)
MOST_FACTORS = 8

PIECE = np.dtype(
    [
        (name, np.int64)
        for name in (
            "inputs",
            "affine",  # in the last input
            "structure",
            "after",  # the piece of its kind that was found before it
            "floors",  # the first of its floors, and how many
            "n_floors",
            "tests",  # conditions: the first rows of the matrix
            "n_tests",
            "columns",  # the rows that follow
            "monomials",
            "n_monomials",
            "matrix",  # where its rows start
        )
    ]
)
FLOOR = np.dtype([(name, np.int64) for name in ("terms", "n_terms", "divisor")])
TERM = np.dtype([("coefficient", np.int64), ("n_factors", np.int64), ("factors", np.int64, (MOST_FACTORS,))])
TEST = np.dtype([(name, np.int64) for name in ("equal", "truth")])


def find(plans: Plans, kind: int, prompt_tokens: int, second: int, third: int) -> int:
    """The piece that holds at these inputs, of which a decode step has two. May make a detour."""
    world, pieces, previous = plans.world, plans.pieces, NOBODY
    index = world["first_piece"][kind]
    while index != NOBODY:
        plans.values[VALUES, 0], plans.values[VALUES, 1], plans.values[VALUES, 2] = prompt_tokens, second, third
        if _holds(plans, pieces[index]):
            if previous != NOBODY:  # neighbours in time are alike: look here first next time
                pieces[previous]["after"] = pieces[index]["after"]
                pieces[index]["after"] = world["first_piece"][kind]
                world["first_piece"][kind] = index
            return int(index)
        previous, index = index, pieces[index]["after"]
    wanted = world["wanted"]
    wanted[0], wanted[1], wanted[2], wanted[3], wanted[4] = WANT_PLAN, kind, prompt_tokens, second, third
    raise Detour


def evaluate(plans: Plans, index: int, prompt_tokens: int, second: int, third: int) -> None:
    """Set values and basis to those of a piece that is known to hold at these inputs."""
    values = plans.values
    values[VALUES, 0], values[VALUES, 1], values[VALUES, 2] = prompt_tokens, second, third
    _set_basis(plans, plans.pieces[index])


def amounts(plans: Plans, index: int, rows: Ints, row: int) -> None:
    """Set a row to the piece's vector at the inputs found last."""
    _multiply(plans, plans.pieces[index], BASIS, rows, row)


def slopes(plans: Plans, index: int, rows: Ints, row: int) -> None:
    """Set a row to its growth with the last input; that is nothing where a piece holds for one step at a time."""
    piece = plans.pieces[index]
    if piece["affine"]:
        _set_rates(plans, piece)
        _multiply(plans, piece, RATES, rows, row)
    else:
        for i in range(piece["columns"]):
            rows[row, i] = 0


def steps_until_change(plans: Plans, index: int) -> int:
    """After how many more units of the last input the slopes, or the piece, no longer hold; `slopes` comes first."""
    piece = plans.pieces[index]
    if not piece["affine"]:
        return 1
    nearest = _floors_until_change(plans, piece)
    width = piece["n_monomials"]
    for i in range(piece["n_tests"]):
        here, rate, start = 0, 0, piece["matrix"] + i * width
        for j in range(width):
            here += plans.matrix[start + j] * plans.values[BASIS, j]
            rate += plans.matrix[start + j] * plans.values[RATES, j]
        if rate == 0:
            continue
        test = plans.tests[piece["tests"] + i]
        if test["equal"]:
            if test["truth"]:
                return 1
            if -here % rate == 0 and -here // rate > 0:
                nearest = min(nearest, -here // rate)
        elif test["truth"] and rate > 0:
            nearest = min(nearest, -(here // rate))
        elif not test["truth"] and rate < 0:
            nearest = min(nearest, here // -rate + 1)
    return nearest


def _floors_until_change(plans: Plans, piece: Record) -> int:
    nearest, last = NEVER, piece["inputs"] - 1
    for i in range(piece["n_floors"]):
        floor = plans.floors[piece["floors"] + i]
        here = _polynomial(plans, floor)
        plans.values[VALUES, last] += 1
        rate = _polynomial(plans, floor) - here
        plans.values[VALUES, last] -= 1
        edge = plans.values[VALUES, piece["inputs"] + i] * floor["divisor"]
        if rate > 0:
            nearest = min(nearest, -(-(edge + floor["divisor"] - here) // rate))
        elif rate < 0:
            nearest = min(nearest, (here - edge) // -rate + 1)
    return nearest


def _holds(plans: Plans, piece: Record) -> bool:
    _set_basis(plans, piece)
    width = piece["n_monomials"]
    for i in range(piece["n_tests"]):
        value, start = 0, piece["matrix"] + i * width
        for j in range(width):
            value += plans.matrix[start + j] * plans.values[BASIS, j]
        test = plans.tests[piece["tests"] + i]
        met = value == 0 if test["equal"] else value < 0
        if met != (test["truth"] != 0):
            return False
    return True


def _set_basis(plans: Plans, piece: Record) -> None:
    for i in range(piece["n_floors"]):
        floor = plans.floors[piece["floors"] + i]
        plans.values[VALUES, piece["inputs"] + i] = _polynomial(plans, floor) // floor["divisor"]
    for i in range(piece["n_monomials"]):
        plans.values[BASIS, i] = _product(plans, plans.terms[piece["monomials"] + i], -1)


def _set_rates(plans: Plans, piece: Record) -> None:
    last = piece["inputs"] - 1
    for i in range(piece["n_monomials"]):
        term, grows = plans.terms[piece["monomials"] + i], False
        for j in range(term["n_factors"]):
            grows = grows or term["factors"][j] == last
        plans.values[RATES, i] = _product(plans, term, last) if grows else 0


def _polynomial(plans: Plans, floor: Record) -> int:
    total = 0
    for i in range(floor["n_terms"]):
        term = plans.terms[floor["terms"] + i]
        total += term["coefficient"] * _product(plans, term, -1)
    return total


def _product(plans: Plans, term: Record, without: int) -> int:
    product = 1
    for i in range(term["n_factors"]):
        factor = term["factors"][i]
        if factor != without:
            product *= plans.values[VALUES, factor]
    return product


def _multiply(plans: Plans, piece: Record, by: int, rows: Ints, row: int) -> None:
    width = piece["n_monomials"]
    start = piece["matrix"] + piece["n_tests"] * width
    for i in range(piece["columns"]):
        total = 0
        for j in range(width):
            total += plans.matrix[start + j] * plans.values[by, j]
        rows[row, i] = total
        start += width
