//! log-softmax, softmax, logsumexp and the gradients through them.

use arbitrary::Arbitrary;
use crossent::ops;

use crate::common::{Kind, Numbers, Pick, Run, Shape, Softmax, near, rows_of, without};
use crate::tensor::{Layout, Tensor};

#[derive(Arbitrary, Clone, Debug)]
pub struct Transform {
    run: Run,
    shape: Shape,
    axis: Pick,
    x: Kind,
    out: Kind,
    upstream: Kind,
    in_place: bool,
    numbers: Numbers,
    gradients: Numbers,
}

impl Transform {
    pub fn check(&self) {
        let exec = self.run.exec();
        let shape = self.shape.dims();
        let axis = self.axis.below(shape.len());
        let dtype = self.x.float();
        let x = self.numbers.reals(dtype, self.x.readable(), &shape);
        let before = x.memory().to_vec();
        let (values, rows) = (x.values(), rows_of(&shape, axis));
        let fibers: Vec<Vec<f64>> = rows.iter().map(|row| row.iter().map(|&at| values[at]).collect()).collect();
        let softmaxes: Vec<Option<Softmax>> = fibers.iter().map(|fiber| Softmax::of(fiber)).collect();

        let mut lse = Tensor::empty(dtype.row_dtype(), self.out.writable(), &without(&shape, axis));
        ops::logsumexp(&exec, &x.array(), &[axis], &lse.out()).expect("valid arguments");
        lse.check_guards();
        for (r, actual) in lse.values().into_iter().enumerate() {
            let max = fibers[r].iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let expected = match &softmaxes[r] {
                Some(softmax) => softmax.lse,
                None if fibers[r].iter().any(|x| x.is_nan()) => f64::NAN,
                None => max,
            };
            near(lse.dtype, actual, expected, max, &("logsumexp", r, self));
        }
        for logs in [true, false] {
            let mut out = if self.in_place {
                Tensor::floats(dtype, self.out.writable(), &shape, &values)
            } else {
                Tensor::empty(dtype, self.out.writable(), &shape)
            };
            {
                let out = out.out();
                let x = if self.in_place { out.array().clone() } else { x.array() };
                if logs { ops::log_softmax(&exec, &x, &[axis], &out) } else { ops::softmax(&exec, &x, &[axis], &out) }
                    .expect("valid arguments");
            }
            out.check_guards();
            let results = out.values();
            for (r, row) in rows.iter().enumerate() {
                for &at in row {
                    let expected = softmaxes[r].as_ref().map_or(f64::NAN, |softmax| softmax.log_p(values[at]));
                    near(dtype, results[at], if logs { expected } else { expected.exp() }, 0.0, &("transform", logs, at, self));
                }
            }
            self.check_gradient(logs, &out, axis, &rows);
        }
        assert_eq!(x.memory(), before, "the logits were written to: {self:?}");
    }

    fn check_gradient(&self, logs: bool, results: &Tensor, axis: usize, rows: &[Vec<usize>]) {
        let dtype = results.dtype;
        let upstream = self.gradients.reals(self.upstream.float(), self.upstream.readable(), &results.shape);
        let mut out = Tensor::empty(dtype, Layout::C, &results.shape);
        let exec = self.run.exec();
        {
            let (g, y, out) = (upstream.array(), results.array(), out.out());
            let done = if logs { ops::log_softmax_vjp(&exec, &g, &y, axis, &out) } else { ops::softmax_vjp(&exec, &g, &y, axis, &out) };
            done.expect("valid arguments");
        }
        out.check_guards();
        let (g, y, actual) = (upstream.values(), results.values(), out.values());
        for row in rows.iter().filter(|row| row.iter().all(|&at| g[at].abs() < 1e10 && (y[at].abs() < 1e4))) {
            let total: f64 = row.iter().map(|&at| if logs { g[at] } else { g[at] * y[at] }).sum();
            let size: f64 = row.iter().map(|&at| if logs { g[at].abs() } else { (g[at] * y[at]).abs() }).sum();
            for &at in row {
                let (expected, p) = if logs { (g[at] - y[at].exp() * total, y[at].exp()) } else { (y[at] * (g[at] - total), y[at].abs()) };
                let size = if logs { g[at].abs() + p * size } else { p * (g[at].abs() + size) };
                near(dtype, actual[at], expected, size, &("gradient", logs, at, self));
            }
        }
    }
}
