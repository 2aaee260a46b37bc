//! The mathematics of one row in plain `f64` loops, written from the formulas and sharing nothing with the crate.
//!
//! Sums are compensated and the rounding of x − m is carried along, so that the oracle is good for a unit or two in the last place of
//! `f64` and therefore exact in the eyes of `f32`.

/// Neumaier's compensated sum.
pub fn sum(terms: impl IntoIterator<Item = f64>) -> f64 {
    let (mut total, mut lost) = (0.0f64, 0.0f64);
    for x in terms {
        let next = total + x;
        if next.is_finite() {
            lost += if total.abs() >= x.abs() { (total - next) + x } else { (x - next) + total };
        }
        total = next;
    }
    total + lost
}

/// exp(x − m) with the rounding of the difference made good.
fn exp_difference(x: f64, m: f64) -> f64 {
    let d = x - m;
    if d == f64::NEG_INFINITY {
        return 0.0;
    }
    // Knuth's two-sum: what d lost of x − m.
    let m_seen = x - d;
    let lost = (x - (d + m_seen)) + (m_seen - m);
    d.exp() * (1.0 + if lost.is_finite() { lost } else { 0.0 })
}

/// One row and what all results are made of.
pub struct Row<'a> {
    x: &'a [f64],
    pub max: f64,
    /// Σ exp(x − max) without one of the maxima.
    rest: f64,
    /// Losses and gradients are nan.
    pub bad: bool,
}

impl<'a> Row<'a> {
    pub fn new(x: &'a [f64]) -> Self {
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let bad = x.iter().any(|x| x.is_nan()) || max.is_infinite();
        let first = x.iter().position(|&v| v == max);
        let rest =
            if bad { f64::NAN } else { sum(x.iter().enumerate().filter(|&(c, _)| Some(c) != first).map(|(_, &v)| exp_difference(v, max))) };
        Self { x, max, rest, bad }
    }

    pub fn logsumexp(&self) -> f64 {
        match () {
            () if self.x.iter().any(|x| x.is_nan()) => f64::NAN,
            () if self.max.is_infinite() => self.max,
            () => self.max + self.rest.ln_1p(),
        }
    }

    pub fn log_p(&self, c: usize) -> f64 {
        if self.bad { f64::NAN } else { (self.x[c] - self.max) - self.rest.ln_1p() }
    }

    pub fn p(&self, c: usize) -> f64 {
        if self.bad { f64::NAN } else { exp_difference(self.x[c], self.max) / (1.0 + self.rest) }
    }

    /// 1 − p without cancellation.
    fn others(&self, c: usize) -> f64 {
        let p = self.p(c);
        if p < 0.5 {
            return 1.0 - p;
        }
        sum((0..self.x.len()).filter(|&k| k != c).map(|k| exp_difference(self.x[k], self.max))) / (1.0 + self.rest)
    }

    /// Σ mass·(−log p); a class without mass adds nothing.
    pub fn loss(&self, mass: &[f64]) -> f64 {
        if self.bad {
            return f64::NAN;
        }
        sum(mass.iter().enumerate().filter(|&(_, &a)| a != 0.0).map(|(c, &a)| a * -self.log_p(c)))
    }

    /// p·Σ mass − mass as (1 − …) products that do not cancel more than they must, and the size of the terms for error bounds.
    pub fn gradient(&self, mass: &[f64], c: usize) -> (f64, f64) {
        if self.bad {
            return (f64::NAN, 0.0);
        }
        let total = sum(mass.iter().copied());
        let others =
            if mass[c] > 0.25 * total { sum(mass.iter().enumerate().filter(|&(k, _)| k != c).map(|(_, &a)| a)) } else { total - mass[c] };
        let (gain, cost) = (self.p(c) * others, self.others(c) * mass[c]);
        // Away from the maximum (p ≤ 1/2) the plain difference p·Σ − mass is what is promised; with one of the two zero it is exact.
        let size = if self.x[c] == self.max || mass[c] == 0.0 || others == 0.0 { gain + cost } else { self.p(c) * total + mass[c] };
        (gain - cost, size)
    }
}
