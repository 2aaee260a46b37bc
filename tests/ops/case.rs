//! One call of `cross_entropy` made of data, what the formulas say of it, and whether the core agrees.

use crossent::array::DType;
use crossent::ops::{self, Exec, Grad, GradOutput, LossOptions, Reduction, Target};

use super::oracle::{self, Row};
use super::tensor::{Layout, READABLE, Tensor};
use super::{Random, close, random_logits, rows_of, without};

#[derive(Clone)]
pub enum Labels {
    Index(Tensor),
    Probs(Tensor),
}

/// One call of `cross_entropy`, made of data.
#[derive(Clone)]
pub struct Case {
    pub x: Tensor,
    pub axis: usize,
    pub labels: Labels,
    pub weight: Option<Tensor>,
    pub smoothing: f64,
    pub ignore: Option<i64>,
    pub reduction: Reduction,
    /// One number for all rows, or one each (with `Reduction::None`).
    pub grad_output: Vec<f64>,
    pub out_layout: Layout,
    pub describe: String,
}

/// What can be chosen; everything else is drawn.
#[derive(Clone, Debug)]
pub struct Choice {
    pub dtype: DType,
    pub layout: Layout,
    pub out_layout: Layout,
    pub shape: Vec<usize>,
    pub axis: usize,
    /// An integer type for indices, a float type for probabilities.
    pub target: DType,
    pub weight: Option<DType>,
    pub smoothing: f64,
    /// One row in so many is ignored; 0 for none.
    pub ignored: usize,
    pub reduction: Reduction,
    pub grad_rows: bool,
    pub seed: u64,
}

impl Choice {
    pub fn build(&self) -> Case {
        let mut random = Random(self.seed);
        let classes = self.shape[self.axis];
        let row_shape = without(&self.shape, &[self.axis]);
        let rows: usize = row_shape.iter().product();
        let groups = rows_of(&self.shape, &[self.axis]);
        let mut x = random_logits(&mut random, self.dtype, self.layout, &self.shape, &[self.axis]);
        let any_layout = |random: &mut Random| READABLE[random.below(READABLE.len())];
        let mut ignore = None;
        let labels = if self.target.is_float() {
            let mut mass: Vec<f64> = (0..x.len()).map(|_| if random.below(4) == 0 { 0.0 } else { random.uniform() }).collect();
            for group in &groups {
                let total: f64 = group.iter().map(|&at| mass[at]).sum();
                // Rows of probabilities need not sum to one; most do.
                if total > 0.0 && random.below(4) != 0 {
                    for &at in group {
                        mass[at] /= total;
                    }
                }
            }
            Labels::Probs(Tensor::floats(self.target, any_layout(&mut random), &self.shape, &mass))
        } else {
            // A small type cannot name every class.
            let nameable = match self.target {
                DType::I8 => classes.min(128),
                DType::U8 => classes.min(256),
                _ => classes,
            };
            let signed = matches!(self.target, DType::I8 | DType::I16 | DType::I32 | DType::I64);
            let marker: i128 = match random.below(3) {
                0 if signed => -100,
                1 if signed => -1,
                _ => random.below(nameable) as i128,
            };
            let mut chosen: Vec<i128> = (0..rows).map(|_| random.below(nameable) as i128).collect();
            if self.ignored > 0 {
                ignore = Some(marker as i64);
                chosen.iter_mut().filter(|_| random.below(self.ignored) == 0).for_each(|y| *y = marker);
                // Ignored rows are never read: whatever stands there has no effect.
                let mut values = x.values();
                for (group, _) in groups.iter().zip(&chosen).filter(|&(_, &y)| y == marker) {
                    for &at in group {
                        values[at] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1.0][random.below(4)];
                    }
                }
                x = Tensor::floats(self.dtype, self.layout, &self.shape, &values);
            }
            Labels::Index(Tensor::ints(self.target, any_layout(&mut random), &row_shape, &chosen))
        };
        let weight = self.weight.map(|dtype| {
            let layout = any_layout(&mut random);
            let w: Vec<f64> = (0..classes).map(|_| if random.below(8) == 0 { 0.0 } else { 0.25 + random.uniform() * 2.0 }).collect();
            if dtype.is_float() {
                Tensor::floats(dtype, layout, &[classes], &w)
            } else {
                Tensor::ints(dtype, layout, &[classes], &w.iter().map(|w| (w * 3.0) as i128).collect::<Vec<_>>())
            }
        });
        let n = if self.grad_rows && self.reduction == Reduction::None { rows } else { 1 };
        let grad_output = (0..n).map(|_| random.normal()).collect();
        Case {
            x,
            axis: self.axis,
            labels,
            weight,
            smoothing: self.smoothing,
            ignore,
            reduction: self.reduction,
            grad_output,
            out_layout: self.out_layout,
            describe: format!("{self:?}"),
        }
    }
}

/// What the formulas say of a case.
pub struct Expected {
    groups: Vec<Vec<usize>>,
    /// None for ignored rows.
    losses: Vec<Option<f64>>,
    /// The divisor of the mean.
    divisor: f64,
    /// Per entry: gradient before `grad_output` and the divisor, and the size of its terms.
    gradient: Vec<(f64, f64)>,
    kept: Vec<bool>,
}

impl Case {
    pub fn expected(&self) -> Expected {
        let x = self.x.values();
        let classes = self.x.shape[self.axis];
        let groups = rows_of(&self.x.shape, &[self.axis]);
        let w = self.weight.as_ref().map_or(vec![1.0; classes], Tensor::values);
        let e = self.smoothing;
        let spread = e / classes as f64;
        let (mut losses, mut kept, mut divisors) = (Vec::new(), Vec::new(), Vec::new());
        let mut gradient = vec![(0.0, 0.0); x.len()];
        let (labels, probs) = match &self.labels {
            Labels::Index(y) => (y.values(), Vec::new()),
            Labels::Probs(p) => (Vec::new(), p.values()),
        };
        for (r, group) in groups.iter().enumerate() {
            let keep = labels.is_empty() || self.ignore.is_none_or(|ignore| labels[r] != ignore as f64);
            kept.push(keep);
            if !keep {
                losses.push(None);
                continue;
            }
            let mass: Vec<f64> = (0..classes)
                .map(|c| {
                    let share = if labels.is_empty() { probs[group[c]] } else { f64::from(u8::from(labels[r] == c as f64)) };
                    w[c] * (share * (1.0 - e) + spread)
                })
                .collect();
            divisors.push(if labels.is_empty() { 1.0 } else { w[labels[r] as usize] });
            let fiber: Vec<f64> = group.iter().map(|&at| x[at]).collect();
            let row = Row::new(&fiber);
            losses.push(Some(row.loss(&mass)));
            for (c, &at) in group.iter().enumerate() {
                gradient[at] = row.gradient(&mass, c);
            }
        }
        Expected { groups, losses, divisor: oracle::sum(divisors), gradient, kept }
    }

    pub fn target(&self) -> Target<'_> {
        match &self.labels {
            Labels::Index(y) => Target::Index(y.array()),
            Labels::Probs(p) => Target::Probs(p.array()),
        }
    }

    pub fn options(&self, reduction: Reduction) -> LossOptions<'_> {
        LossOptions {
            weight: self.weight.as_ref().map(Tensor::array),
            ignore_index: self.ignore,
            label_smoothing: self.smoothing,
            reduction,
            ..LossOptions::default()
        }
    }

    /// Runs the case and returns loss, rows and gradient.
    pub fn run(&self, exec: &Exec, reduction: Reduction, grad: bool, in_place: bool) -> (f64, Tensor, Tensor) {
        let mut rows = Tensor::empty(self.x.dtype.row_dtype(), self.out_layout, &without(&self.x.shape, &[self.axis]));
        let mut place = if in_place {
            Tensor::floats(self.x.dtype, self.out_layout, &self.x.shape, &self.x.values())
        } else {
            Tensor::empty(self.x.dtype, self.out_layout, &self.x.shape)
        };
        let before = self.x.memory().to_vec();
        let upstream = Tensor::floats(
            DType::F64,
            Layout::C,
            &rows.shape,
            &if self.grad_output.len() == rows.len() { self.grad_output.clone() } else { vec![0.0; rows.len()] },
        );
        let loss = {
            let out = place.out();
            let x = if in_place { out.array().clone() } else { self.x.array() };
            let grad_output =
                if self.grad_output.len() == 1 { GradOutput::Scalar(self.grad_output[0]) } else { GradOutput::Rows(upstream.array()) };
            let grad = grad.then_some(Grad { out, grad_output });
            let row_out = (reduction == Reduction::None).then(|| rows.out());
            ops::cross_entropy(exec, &x, self.axis, &self.target(), &self.options(reduction), row_out.as_ref(), grad.as_ref()).unwrap()
        };
        rows.check_guards();
        place.check_guards();
        assert_eq!(self.x.memory(), before, "logits were written to: {}", self.describe);
        (loss, rows, place)
    }

    pub fn check(&self, exec: &Exec) {
        let expected = self.expected();
        let context = || format!("{} with {exec:?}", self.describe);
        let row_type = self.x.dtype.row_dtype();

        let (zero, rows, _) = self.run(exec, Reduction::None, false, false);
        assert_eq!(zero, 0.0, "{}", context());
        let rows = rows.values();
        for (r, (&actual, expected)) in rows.iter().zip(&expected.losses).enumerate() {
            match expected {
                Some(exact) => close(row_type, 4.0, actual, *exact, 0.0, &|| format!("loss of row {r}: {}", context())),
                None => assert_eq!(actual, 0.0, "loss of ignored row {r}: {}", context()),
            }
        }
        // The reductions are those of the rows that are returned for logits of the same layout, carried in f64.
        let check_reduced = |name: &str, loss: f64, rows: &[f64]| {
            let total = oracle::sum(rows.iter().copied());
            let size = oracle::sum(rows.iter().map(|l| l.abs()));
            let divisor = if self.reduction == Reduction::Mean { expected.divisor } else { 1.0 };
            let reduced = total / divisor;
            if self.reduction == Reduction::None {
                assert_eq!(loss, 0.0, "{name}: {}", context());
            } else if reduced.is_finite() {
                let bound = size / divisor * f64::EPSILON * (8.0 + rows.len() as f64).min(64.0);
                assert!((loss - reduced).abs() <= bound, "{name}: {loss:e}, sum of the rows {reduced:e}: {}", context());
            } else {
                assert!(loss == reduced || loss.is_nan() && reduced.is_nan(), "{name}: {loss}, sum of the rows {reduced}: {}", context());
            }
        };
        check_reduced("loss", self.run(exec, self.reduction, false, false).0, &rows);

        for (name, in_place) in [("out", false), ("in place", true)] {
            let (loss, rows_too, gradient) = self.run(exec, self.reduction, true, in_place);
            let rows_too = if self.reduction == Reduction::None {
                rows_too.values()
            } else {
                self.run(exec, Reduction::None, true, in_place).1.values()
            };
            check_reduced(name, loss, &rows_too);
            if in_place {
                // Rows may be read in another layout, so that the last bits differ.
                for (r, (&actual, expected)) in rows_too.iter().zip(&expected.losses).enumerate() {
                    close(row_type, 4.0, actual, expected.unwrap_or(0.0), 0.0, &|| {
                        format!("loss of row {r} with gradient {name}: {}", context())
                    });
                }
            } else {
                let same = rows.iter().zip(&rows_too).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan());
                assert!(same, "losses with and without gradient differ: {rows:?} and {rows_too:?}: {}", context());
            }
            let gradient = gradient.values();
            for (r, group) in expected.groups.iter().enumerate() {
                let mut factor = self.grad_output[r % self.grad_output.len()];
                if self.reduction == Reduction::Mean {
                    factor /= expected.divisor;
                }
                for (c, &at) in group.iter().enumerate() {
                    let what = || format!("gradient {name} row {r} class {c}: {}", context());
                    if !expected.kept[r] {
                        assert_eq!(gradient[at], 0.0, "ignored row: {}", what());
                        continue;
                    }
                    let (exact, size) = expected.gradient[at];
                    if expected.divisor == 0.0 && self.reduction == Reduction::Mean && self.smoothing > 0.0 {
                        // Something over nothing: infinite or nan, the contract names neither.
                        assert!(!gradient[at].is_finite(), "{}", what());
                        continue;
                    }
                    close(self.x.dtype, 8.0, gradient[at], exact * factor, size * factor, &what);
                }
            }
        }
    }
}
