//! Cross-entropy with every option.

use arbitrary::Arbitrary;
use crossent::array::DType;
use crossent::ops::{self, Error, Grad, GradOutput, LossOptions, Reduction, Target};

use crate::common::{Kind, Numbers, Pick, Run, Shape, Softmax, near, rows_of, without};
use crate::tensor::{FLOATS, INTS, Layout, Tensor};

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Labels {
    Index,
    Probs,
    Mixup,
    Sparse(u8),
}

#[derive(Arbitrary, Clone, Debug)]
pub struct Loss {
    run: Run,
    shape: Shape,
    axis: Pick,
    x: Kind,
    numbers: Numbers,
    labels: Labels,
    /// Of labels and of what goes with them.
    target: [Kind; 2],
    classes: [Numbers; 2],
    shares: Numbers,
    ignore: Option<i8>,
    smoothing: Pick,
    weight: Option<(Kind, Numbers)>,
    sample_weight: Option<(Kind, Numbers)>,
    normalizer: Option<u8>,
    z_loss: Pick,
    softcap: Option<Pick>,
    temperature: Pick,
    mask: Option<(Kind, Numbers)>,
    reduction: Pick,
    out: Kind,
    in_place: bool,
    upstream: Option<Numbers>,
}

/// The arrays of a call.
struct Arrays {
    x: Tensor,
    indices: [Tensor; 2],
    shares: Tensor,
    weight: Option<Tensor>,
    sample_weight: Option<Tensor>,
    mask: Option<Tensor>,
    upstream: Option<Tensor>,
}

/// Their numbers.
struct Values {
    x: Vec<f64>,
    indices: [Vec<f64>; 2],
    shares: Vec<f64>,
    weight: Vec<f64>,
    sample_weight: Option<Vec<f64>>,
    mask: Option<Vec<f64>>,
}

impl Arrays {
    fn values(&self, classes: usize) -> Values {
        Values {
            x: self.x.values(),
            indices: [self.indices[0].values(), self.indices[1].values()],
            shares: self.shares.values(),
            weight: self.weight.as_ref().map_or(vec![1.0; classes], Tensor::values),
            sample_weight: self.sample_weight.as_ref().map(Tensor::values),
            mask: self.mask.as_ref().map(Tensor::values),
        }
    }
}

/// A class of a row, and its share of the target.
type Named = (f64, f64);

/// What the formulas say of a row that is kept.
struct Row {
    loss: f64,
    size: f64,
    divisor: f64,
    /// Before `grad_output` and the divisor, with the size of the terms.
    gradient: Vec<(f64, f64)>,
}

impl Loss {
    fn options<'a>(&self, arrays: &'a Arrays) -> LossOptions<'a> {
        LossOptions {
            weight: arrays.weight.as_ref().map(Tensor::array),
            // Probabilities have no label to ignore.
            ignore_index: if matches!(self.labels, Labels::Index | Labels::Mixup) { self.ignore.map(i64::from) } else { None },
            label_smoothing: self.smoothing.of(&[0.0, 0.0, 0.1, 1.0]),
            reduction: self.reduction.of(&[Reduction::Mean, Reduction::Sum, Reduction::None]),
            sample_weight: arrays.sample_weight.as_ref().map(Tensor::array),
            normalizer: self.normalizer.map(|n| 1.0 + f64::from(n)),
            z_loss: self.z_loss.of(&[0.0, 0.0, 1e-4, 0.5]),
            softcap: self.softcap.map(|cap| cap.of(&[30.0, 2.0, 1e-3, 1e6])),
            temperature: self.temperature.of(&[1.0, 1.0, 2.0, 0.5, 3.0]),
            mask: arrays.mask.as_ref().map(Tensor::array),
        }
    }

    fn arrays(&self, shape: &[usize], axis: usize) -> Arrays {
        let classes = shape[axis];
        let mut of_labels = without(shape, axis);
        let rows = of_labels.clone();
        if let Labels::Sparse(k) = self.labels {
            of_labels.push(k as usize % 5);
        }
        let n: usize = of_labels.iter().product();
        let index = |i: usize| {
            let chosen: Vec<i128> = (0..n).map(|r| self.classes[i].label(r, classes)).collect();
            Tensor::ints(self.target[i].of(&INTS), self.target[i].readable(), &of_labels, &chosen)
        };
        let like = if matches!(self.labels, Labels::Probs) { shape } else { &of_labels };
        Arrays {
            x: self.numbers.reals(self.x.float(), self.x.readable(), shape),
            indices: [index(0), index(1)],
            shares: self.shares.shares(self.target[1].float(), self.target[1].readable(), like),
            weight: self.weight.as_ref().map(|(kind, numbers)| numbers.shares(kind.float(), kind.readable(), &[classes])),
            sample_weight: self.sample_weight.as_ref().map(|(kind, numbers)| numbers.shares(kind.float(), kind.readable(), &rows)),
            mask: self.mask.as_ref().map(|(kind, numbers)| {
                let flags: Vec<i128> = (0..shape.iter().product()).map(|i| i128::from(numbers.flag(i))).collect();
                Tensor::ints(DType::Bool, kind.readable(), shape, &flags)
            }),
            upstream: self.upstream.as_ref().map(|numbers| numbers.shares(self.out.of(&FLOATS), Layout::C, &rows)),
        }
    }

    /// The classes that each row names; None for a label out of bounds.
    fn named(&self, values: &Values, options: &LossOptions, group: &[usize], r: usize) -> Option<Vec<Named>> {
        let classes = group.len() as f64;
        let ignored = |y: f64| options.ignore_index.is_some_and(|i| y == i as f64);
        let (y, share) = (&values.indices, &values.shares);
        let candidates: Vec<Named> = match self.labels {
            Labels::Index => vec![(y[0][r], 1.0)],
            Labels::Mixup => vec![(y[0][r], share[r]), (y[1][r], 1.0 - share[r])],
            Labels::Sparse(k) => {
                let k = k as usize % 5;
                (r * k..(r + 1) * k).map(|i| (y[0][i], share[i])).collect()
            }
            Labels::Probs => group.iter().enumerate().map(|(c, &at)| (c as f64, share[at])).collect(),
        };
        let kept: Vec<Named> = candidates.into_iter().filter(|&(y, _)| !ignored(y)).collect();
        kept.iter().all(|(y, _)| (0.0..classes).contains(y)).then_some(kept)
    }

    fn row(&self, values: &Values, options: &LossOptions, group: &[usize], r: usize, named: &[Named]) -> Row {
        let Values { x, weight: w, mask, .. } = values;
        let s = values.sample_weight.as_ref().map_or(1.0, |s| s[r]);
        let open = |c: usize| mask.as_ref().is_none_or(|mask| mask[group[c]] != 0.0);
        let bend = |x: f64| match options.softcap {
            Some(cap) => (cap * (x / cap).tanh(), (x / cap).cosh().powi(-2)),
            None => (x, 1.0),
        };
        let bent: Vec<(f64, f64)> = group.iter().map(|&at| bend(x[at])).collect();
        let z: Vec<f64> = bent.iter().map(|&(z, _)| z / options.temperature).collect();
        let seen: Vec<f64> = (0..group.len()).filter(|&c| open(c)).map(|c| z[c]).collect();
        let (e, count) = (options.label_smoothing, seen.len() as f64);
        let mut mass: Vec<f64> = (0..group.len()).map(|c| if open(c) && e > 0.0 { w[c] * e / count } else { 0.0 }).collect();
        let whole = matches!(self.labels, Labels::Probs | Labels::Sparse(_));
        let mut divisor = if whole { 1.0 } else { 0.0 };
        // Smoothing of a mixed row goes with the sides that are kept.
        let sides: f64 = if matches!(self.labels, Labels::Mixup) { named.iter().map(|&(_, share)| share).sum() } else { 1.0 };
        mass.iter_mut().for_each(|m| *m *= sides);
        for &(y, share) in named {
            mass[y as usize] += w[y as usize] * share * (1.0 - e);
            if !whole {
                divisor += w[y as usize] * share;
            }
        }
        if group.is_empty() {
            // A sum over nothing, and a logsumexp of −inf.
            let loss = if options.z_loss > 0.0 { f64::INFINITY } else { 0.0 };
            return Row { loss, size: 0.0, divisor: divisor * s, gradient: Vec::new() };
        }
        let Some(softmax) = Softmax::of(&seen) else {
            let gradient = (0..group.len()).map(|c| (if open(c) && !seen.is_empty() { f64::NAN } else { 0.0 }, 0.0)).collect();
            return Row { loss: f64::NAN, size: 0.0, divisor: divisor * s, gradient };
        };
        // The capped logit is rounded once.
        let cap = if options.softcap.is_some() {
            softmax.max.abs() + seen.iter().fold(0.0, |a: f64, z| a.max(if z.is_finite() { z.abs() } else { 0.0 }))
        } else {
            0.0
        };
        let (mut loss, mut size) = (0.0, 0.0);
        let total: f64 = mass.iter().sum();
        for (c, &m) in mass.iter().enumerate().filter(|&(_, &m)| m != 0.0) {
            let cost = if open(c) { -softmax.log_p(z[c]) } else { f64::INFINITY };
            loss += m * cost;
            size += m * (cost.abs() + cap);
        }
        let lse = softmax.lse;
        loss += options.z_loss * lse * lse;
        size += options.z_loss * (lse.abs() + softmax.max.abs() + cap).powi(2);
        let gradient = (0..group.len())
            .map(|c| {
                if !open(c) {
                    return (0.0, 0.0);
                }
                let p = softmax.log_p(z[c]).exp();
                let slope = s * bent[c].1 / options.temperature;
                let extra = 2.0 * options.z_loss * lse;
                let terms = p * (total + extra.abs()) * (1.0 + cap) + mass[c] + 2.0 * options.z_loss * p * softmax.max.abs();
                let terms = terms * slope;
                (slope * (p * (total + extra) - mass[c]), terms)
            })
            .collect();
        Row { loss: s * loss, size: s * size, divisor: divisor * s, gradient }
    }

    pub fn check(&self) {
        let (shape, exec) = (self.shape.dims(), self.run.exec());
        let axis = self.axis.below(shape.len());
        let arrays = self.arrays(&shape, axis);
        let options = self.options(&arrays);
        let float = arrays.x.dtype.row_dtype();
        let mut losses = Tensor::empty(float, self.out.writable(), &without(&shape, axis));
        let mut gradient = if self.in_place {
            Tensor::floats(arrays.x.dtype, self.out.writable(), &shape, &arrays.x.values())
        } else {
            Tensor::empty(arrays.x.dtype, self.out.writable(), &shape)
        };
        let before = (losses.memory().to_vec(), gradient.memory().to_vec());
        let inputs = arrays.x.memory().to_vec();
        let [a, b] = &arrays.indices;
        let target = match self.labels {
            Labels::Index => Target::Index(a.array()),
            Labels::Probs => Target::Probs(arrays.shares.array()),
            Labels::Mixup => Target::Mixup { a: a.array(), b: b.array(), lam: arrays.shares.array() },
            Labels::Sparse(_) => Target::Sparse { indices: a.array(), probs: arrays.shares.array() },
        };
        let none = options.reduction == Reduction::None;
        let upstream = arrays.upstream.as_ref().filter(|_| none);
        let factors = upstream.map(Tensor::values);
        let done = {
            let out = gradient.out();
            let x = if self.in_place { out.array().clone() } else { arrays.x.array() };
            let grad_output = upstream.map_or(GradOutput::Scalar(0.75), |rows| GradOutput::Rows(rows.array()));
            let rows = none.then(|| losses.out());
            ops::cross_entropy(&exec, &x, axis, &target, &options, rows.as_ref(), Some(&Grad { out, grad_output }))
        };
        assert_eq!(inputs, arrays.x.memory(), "the logits were written to: {self:?}");
        let groups = rows_of(&shape, axis);
        let values = arrays.values(shape[axis]);
        let off = |r: usize| values.sample_weight.as_ref().is_some_and(|s| s[r] == 0.0);
        let named: Vec<Option<Vec<Named>>> = groups.iter().enumerate().map(|(r, group)| self.named(&values, &options, group, r)).collect();
        let reduced = match done {
            Ok(reduced) => {
                assert!(
                    named.iter().enumerate().all(|(r, named)| named.is_some() || off(r)),
                    "a label out of bounds was accepted: {self:?}"
                );
                reduced
            }
            Err(Error::TargetOutOfBounds { .. }) => {
                assert!(named.iter().any(Option::is_none), "labels in bounds were refused: {self:?}");
                assert!(before == (losses.memory().to_vec(), gradient.memory().to_vec()), "written before an error: {self:?}");
                return;
            }
            Err(error) => panic!("{error}: {self:?}"),
        };
        losses.check_guards();
        gradient.check_guards();
        let rows: Vec<Option<Row>> = groups
            .iter()
            .zip(&named)
            .enumerate()
            .map(|(r, (group, named))| {
                let named = named.as_ref().filter(|_| !off(r))?;
                let dropped = named.is_empty() && !matches!(self.labels, Labels::Probs | Labels::Sparse(_));
                (!dropped).then(|| self.row(&values, &options, group, r, named))
            })
            .collect();
        let divisor: f64 = match options.reduction {
            Reduction::Mean => options.normalizer.unwrap_or_else(|| rows.iter().flatten().map(|row| row.divisor).sum()),
            _ => 1.0,
        };
        let (losses, gradient) = (losses.values(), gradient.values());
        let (mut total, mut size) = (0.0, 0.0);
        for (r, row) in rows.iter().enumerate() {
            let Some(row) = row else {
                assert!(!none || losses[r] == 0.0, "row {r}: {}: {self:?}", losses[r]);
                assert!(groups[r].iter().all(|&at| gradient[at] == 0.0), "gradient of row {r}: {self:?}");
                continue;
            };
            // The reductions are of the rows, which are of this type.
            total += if float == DType::F32 { f64::from(row.loss as f32) } else { row.loss };
            size += row.size;
            if none {
                near(float, losses[r], row.loss, row.size, &("loss", r, self));
            }
            let factor = factors.as_ref().map_or(0.75, |g| g[r]) / divisor;
            if !factor.is_finite() {
                continue;
            }
            for (&at, &(expected, size)) in groups[r].iter().zip(&row.gradient) {
                // Terms beyond any use: the sum of z-loss and of logits of 1e30.
                if !(size < 1e15) && !expected.is_nan() {
                    continue;
                }
                near(arrays.x.dtype, gradient[at], expected * factor, size * factor, &("gradient", at, self));
            }
        }
        if !none && divisor != 0.0 {
            near(float, reduced, total / divisor, size / divisor, &("reduced", self));
        }
    }
}
