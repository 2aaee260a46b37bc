"""Derives the constants of src/kernels/real.rs.

    python tools/minimax.py            print them as Rust
    python tools/minimax.py --check    compare them with src/kernels/real.rs; exit 1 on any difference

Needs mpmath. Each polynomial is the weighted minimax fit (Remez exchange) of one function. Its coefficients are rounded to the working
type one by one, lowest degree first; after each rounding the remaining ones are fitted again, so that they make up for it.
The last column printed is the largest relative error of the rounded polynomial in exact arithmetic, as a power of two.
"""

import argparse
import re
import sys
from pathlib import Path

from mpmath import mp, mpf

mp.dps = 60
SOURCE = Path(__file__).resolve().parent.parent / "src" / "kernels" / "real.rs"
GRID = 1500


def round_to(x, bits):
    """The nearest number of `bits` significant bits (ties to even); none of our constants is subnormal."""
    if x == 0:
        return mpf(0)
    _, exponent = mp.frexp(x)
    unit = mpf(2) ** (exponent - bits)
    return mp.nint(x / unit) * unit


def minimax(basis, target, lo, hi):
    """Coefficients c that minimise max |sum c_i basis_i(x) - target(x)| on [lo, hi], and that maximum."""
    count = len(basis)
    grid = [lo + (hi - lo) * (1 - mp.cos(mp.pi * i / GRID)) / 2 for i in range(GRID + 1)]
    table = [[b(x) for b in basis] for x in grid]
    wanted = [target(x) for x in grid]
    # Start from the extrema of the Chebyshev polynomial that an unweighted fit would have.
    points = [round(GRID * i / count) for i in range(count + 1)]
    for _ in range(60):
        system = mp.matrix(count + 1, count + 1)
        right = mp.matrix(count + 1, 1)
        for row, point in enumerate(points):
            for column in range(count):
                system[row, column] = table[point][column]
            system[row, count] = (-1) ** row
            right[row] = wanted[point]
        solution = mp.lu_solve(system, right)
        coefficients = [solution[i] for i in range(count)]
        error = [mp.fdot(coefficients, line) - want for line, want in zip(table, wanted, strict=True)]
        # One extremum for each stretch of equal sign; drop the smaller end until the count is right.
        extrema = []
        for i, e in enumerate(error):
            if e == 0:
                continue
            if extrema and (error[extrema[-1]] > 0) == (e > 0):
                if abs(e) > abs(error[extrema[-1]]):
                    extrema[-1] = i
            else:
                extrema.append(i)
        while len(extrema) > count + 1:
            if len(extrema) == count + 2:
                extrema.pop(0 if abs(error[extrema[0]]) < abs(error[extrema[-1]]) else -1)
            else:
                # Remove the neighbouring pair with the smallest error: the signs still alternate.
                weakest = min(range(len(extrema) - 1), key=lambda i: max(abs(error[extrema[i]]), abs(error[extrema[i + 1]])))
                del extrema[weakest : weakest + 2]
        worst = max(abs(e) for e in error)
        if len(extrema) < count + 1 or extrema == points or worst < abs(solution[count]) * (1 + mpf(10) ** -6):
            return coefficients, worst
        points = extrema
    return coefficients, worst


def polynomial(bits, degrees, lo, hi, *, fixed, term, function, weight):
    """Fits `function(x) = fixed(x) + sum c_i term(x)^degrees_i` with error times `weight(x)`; rounded c and the error of that."""
    known = []

    def residue(x, weight):
        return (function(x) - fixed(x) - sum(c * term(x, d) for c, d in zip(known, degrees, strict=False))) * weight(x)

    while len(known) < len(degrees):
        lowest = degrees[len(known)]

        def turned(x, lowest=lowest):
            # Alternation holds for the factor of x^lowest, so the sign of x^lowest is taken out.
            return weight(x) * (mp.sign(x) if lowest % 2 else 1)

        basis = [lambda x, d=d: term(x, d) * turned(x) for d in degrees[len(known) :]]
        coefficients, _ = minimax(basis, lambda x: residue(x, turned), lo, hi)
        known.append(round_to(coefficients[0], bits))
    worst = max(abs(residue(lo + (hi - lo) * i / (4 * GRID), weight)) for i in range(4 * GRID + 1))
    return known, worst


def exp2_polynomial(bits, degree, reach):
    """2^r = 1 + r (c0 + c1 r + ...) for |r| <= reach, relative error."""
    return polynomial(
        bits,
        range(1, degree + 1),
        -reach,
        reach,
        fixed=lambda r: mpf(1),
        term=lambda r, d: r**d,
        function=lambda r: mpf(2) ** r,
        weight=lambda r: mpf(2) ** -r,
    )


def exp2_monic(bits, degree, reach, lead):
    """2^(r + lead) = c0 + c1 r + ... + r^degree for |r| <= reach, relative error."""
    return polynomial(
        bits,
        range(degree),
        -reach,
        reach,
        fixed=lambda r: r**degree,
        term=lambda r, d: r**d,
        function=lambda r: mpf(2) ** (r + lead),
        weight=lambda r: mpf(2) ** -(r + lead),
    )


def expm1_polynomial(bits, degree):
    """e^r - 1 = r + r^2 (c0 + c1 r + ...) for |r| <= ln(2)/2 and a little, relative error."""
    reach = mp.log(2) / 2 * (1 + mpf(2) ** -10)

    def weight(r):
        # At r = 0 the error is 0: weight 0 there instead of 0/0.
        return 1 / abs(mp.expm1(r)) if r else mpf(0)

    return polynomial(
        bits, range(2, degree + 1), -reach, reach, fixed=lambda r: r, term=lambda r, d: r**d, function=mp.expm1, weight=weight
    )


def log_polynomial(bits, count):
    """(2 atanh(s) - 2s) / s = z (c0 + c1 z + ...) with z = s^2, for (1+s)/(1-s) in [sqrt(1/2), sqrt(2)]; relative to 2 atanh(s)."""
    top = ((mp.sqrt(2) - 1) / (mp.sqrt(2) + 1)) ** 2 * (1 + mpf(2) ** -10)

    def rest(z):
        s = mp.sqrt(z)
        return 2 * mp.atanh(s) / s - 2 if z else mpf(0)

    return polynomial(
        bits,
        range(1, count + 1),
        mpf(0),
        top,
        fixed=lambda z: mpf(0),
        term=lambda z, d: z**d,
        function=rest,
        weight=lambda z: 1 / (2 + rest(z)),
    )


def tanh_polynomial(bits, count):
    """tanh(x)/x = 1 + z (c0 + c1 z + ...) with z = x^2, for |x| <= 5/8, relative error."""

    def ratio(z):
        x = mp.sqrt(z)
        return mp.tanh(x) / x if z else mpf(1)

    return polynomial(
        bits,
        range(1, count + 1),
        mpf(0),
        mpf(25) / 64,
        fixed=lambda z: mpf(1),
        term=lambda z, d: z**d,
        function=ratio,
        weight=lambda z: 1 / ratio(z),
    )


def split(x, bits):
    """x as an unevaluated sum of two numbers of `bits` bits."""
    hi = round_to(x, bits)
    return [hi, round_to(x - hi, bits)]


def constants():
    """Yields (impl, name, values, relative error or None)."""
    for name, bits, slack in (("f32", 24, 8), ("f64", 53, 20)):
        # The rounding of x·log2 e may miss the nearest integer by |x|·2^-bits: `slack` bits below 1.
        reach = mpf(1) / 2 + mpf(2) ** -slack
        degree = {24: 6, 53: 11}[bits]
        values, error = exp2_polynomial(bits, degree, reach)
        yield name, "EXP2", values, error
        # With 8 and 16 steps per octave.
        eighth, sixteenth = mpf(1) / 16 + mpf(2) ** -slack, mpf(1) / 32 + mpf(2) ** -slack
        if name == "f32":
            values, error = exp2_polynomial(bits, 4, eighth)
            yield name, "EXP2_8", values, error
        values, error = exp2_polynomial(bits, {24: 3, 53: 6}[bits], sixteenth)
        yield name, "EXP2_16", values, error
        yield name, "OCTAVE", [round_to(mpf(2) ** (mpf(j) / 16), bits) for j in range(16)], None
        # The last coefficient is about one for a lead of 31.1 octaves (f32's 12.7 are too far from whole ones),
        if name == "f64":
            values, error = exp2_monic(bits, degree, reach, mpf(31))
            yield name, "LED", values, error
            yield name, "LEAD", [mpf(31)], None
        # or of 53.6 steps.
        if name == "f32":
            lead = mpf(53) / 8
            values, error = exp2_monic(bits, 4, eighth, lead)
            yield name, "LED_8", values, error
            yield name, "LEAD_8", [lead], None
        values, error = expm1_polynomial(bits, degree + 1)
        yield name, "EXPM1", values, error
        yield name, "LN2", split(mp.log(2), bits), None
        values, error = log_polynomial(bits, {24: 3, 53: 7}[bits])
        yield name, "LOG", values, error
        values, error = tanh_polynomial(bits, {24: 5, 53: 12}[bits])
        yield name, "TANH", values, error
    yield "f64", "LOG2_E", split(1 / mp.log(2), 53), None


def shortest(x, kind):
    """The shortest decimal that reads back as x, as Rust wants it."""
    if kind == "f64":
        text = repr(float(x))
    else:
        for digits in range(1, 18):
            text = f"{float(x):.{digits}g}"
            if round_to(mpf(text), 24) == x:
                break
    text = text.replace("e-0", "e-")
    if "." not in text and "e" not in text:
        text += ".0"
    mantissa, _, exponent = text.partition("e")
    return mantissa + (f"e{exponent}" if exponent else "")


def grouped(text):
    """12345.6789 -> 12_345.678_9, which clippy asks for."""
    mantissa, e, exponent = text.partition("e")
    whole, dot, digits = mantissa.partition(".")
    if len(whole) > 3:
        whole = f"{int(whole):_}"
    return whole + dot + "_".join(digits[i : i + 3] for i in range(0, len(digits), 3)) + e + exponent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with src/kernels/real.rs")
    check = parser.parse_args().check
    source = SOURCE.read_text() if check else ""
    wrong = 0
    for kind, name, values, error in constants():
        note = "" if error is None else f"  // 2^{float(mp.log(error, 2)):.2f}"
        print(f"// {kind} {name}{note}")
        if not check:
            for value in values:
                print(f"    {grouped(shortest(value, kind))},")
            continue
        pattern = rf"const {name}: (?:{kind} = ([^;]*);|[^=]*\b{kind}\b[^=]*= &?\[([^\]]*)\];)"
        found = ["".join(either) for either in re.findall(pattern, source)]
        if len(found) != 1:
            print(f"  {SOURCE.name} has {len(found)} definitions of {kind} {name}, not one")
            wrong += 1
            continue
        have = [number for number in re.sub(r"//.*|[\s_]", "", found[0]).split(",") if number]
        # As exact binary fractions: what the compiler will make of the literals.
        bits = 24 if kind == "f32" else 53
        same = [round_to(mpf(n), bits) for n in have] == list(values)
        print("  ok" if same else f"  differs: {have}\n  wanted:  {[shortest(v, kind) for v in values]}")
        wrong += not same
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
