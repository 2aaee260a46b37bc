//! Scores of tokens, the largest log-probabilities, KL divergence.

use arbitrary::Arbitrary;
use crossent::array::DType;
use crossent::ops::{self, Error, Grad, GradOutput, Reduction, Scores};

use crate::common::{Kind, Numbers, Pick, Run, Shape, Softmax, near, rows_of, without};
use crate::tensor::{INTS, Layout, Tensor};

#[derive(Arbitrary, Clone, Debug)]
pub struct ByProduct {
    run: Run,
    shape: Shape,
    axis: Pick,
    x: Kind,
    y: Kind,
    out: Kind,
    tokens: Kind,
    labels: Numbers,
    ignore: Option<i8>,
    k: u8,
    temperature: Pick,
    in_place: bool,
    numbers: Numbers,
    others: Numbers,
}

impl ByProduct {
    pub fn check(&self) {
        let shape = self.shape.dims();
        let axis = self.axis.below(shape.len());
        let x = self.numbers.reals(self.x.float(), self.x.readable(), &shape);
        let (values, rows) = (x.values(), rows_of(&shape, axis));
        let fibers: Vec<Vec<f64>> = rows.iter().map(|row| row.iter().map(|&at| values[at]).collect()).collect();
        self.check_scores(&x, axis, &fibers);
        self.check_topk(&x, axis, &fibers);
        self.check_kl(&x, axis, &rows, &fibers);
    }

    fn check_scores(&self, x: &Tensor, axis: usize, fibers: &[Vec<f64>]) {
        let (classes, shape, float) = (x.shape[axis], without(&x.shape, axis), x.dtype.row_dtype());
        let chosen: Vec<i128> = (0..fibers.len()).map(|r| self.labels.label(r, classes)).collect();
        let tokens = Tensor::ints(self.tokens.of(&INTS), self.tokens.readable(), &shape, &chosen);
        let seen = tokens.values();
        let layout = self.out.writable();
        let (mut logprob, mut lse, mut entropy) =
            (Tensor::empty(float, layout, &shape), Tensor::empty(float, layout, &shape), Tensor::empty(float, layout, &shape));
        let (mut argmax, mut rank) = (Tensor::empty(DType::I64, layout, &shape), Tensor::empty(DType::I64, layout, &shape));
        let mut greedy = Tensor::empty(DType::Bool, layout, &shape);
        let all = |t: &[&Tensor]| t.iter().map(|t| t.memory().to_vec()).collect::<Vec<_>>();
        let before = all(&[&logprob, &lse, &entropy, &argmax, &rank, &greedy]);
        let ignore = self.ignore.map(i64::from);
        let done = {
            let scores = Scores {
                logprob: logprob.out(),
                logsumexp: lse.out(),
                argmax: argmax.out(),
                greedy: greedy.out(),
                entropy: Some(entropy.out()),
                rank: Some(rank.out()),
            };
            ops::score_tokens(&self.run.exec(), &x.array(), axis, &tokens.array(), ignore, &scores)
        };
        let is_ignored = |r: usize| ignore.is_some_and(|i| seen[r] == i as f64);
        let bad = (0..fibers.len()).any(|r| !is_ignored(r) && !(0.0..classes as f64).contains(&seen[r]));
        match done {
            Ok(()) => assert!(!bad, "a token out of bounds was accepted: {self:?}"),
            Err(Error::TargetOutOfBounds { .. }) => {
                assert!(bad, "tokens in bounds were refused: {self:?}");
                assert_eq!(before, all(&[&logprob, &lse, &entropy, &argmax, &rank, &greedy]), "written before an error: {self:?}");
                return;
            }
            Err(error) => panic!("{error}: {self:?}"),
        }
        for tensor in [&logprob, &lse, &entropy, &argmax, &rank, &greedy] {
            tensor.check_guards();
        }
        let (logprob, lse, entropy) = (logprob.values(), lse.values(), entropy.values());
        let (argmax, rank) = (argmax.values(), rank.values());
        for (r, fiber) in fibers.iter().enumerate() {
            if is_ignored(r) {
                assert_eq!((logprob[r], lse[r], entropy[r], argmax[r], rank[r]), (0.0, 0.0, 0.0, -1.0, -1.0), "row {r} of {self:?}");
                continue;
            }
            let x = fiber[seen[r] as usize];
            let Some(softmax) = Softmax::of(fiber) else {
                assert!(logprob[r].is_nan() && entropy[r].is_nan(), "row {r} of {self:?}");
                continue;
            };
            near(float, logprob[r], softmax.log_p(x), 0.0, &("logprob", r, self));
            near(float, lse[r], softmax.lse, softmax.max, &("logsumexp", r, self));
            let expected: f64 = fiber.iter().map(|&v| softmax.log_p(v)).map(|lp| if lp < -700.0 { 0.0 } else { -lp.exp() * lp }).sum();
            near(float, entropy[r], expected, 0.0, &("entropy", r, self));
            assert_eq!(argmax[r] as usize, fiber.iter().position(|&v| v == softmax.max).expect("the maximum"), "row {r} of {self:?}");
            assert_eq!(rank[r] as usize, fiber.iter().filter(|&&v| v > x).count(), "row {r} of {self:?}");
        }
    }

    fn check_topk(&self, x: &Tensor, axis: usize, fibers: &[Vec<f64>]) {
        let k = self.k as usize % (x.shape[axis] + 1);
        let mut shape = x.shape.clone();
        shape[axis] = k;
        let layout = self.out.writable();
        let (mut logprobs, mut indices) = (Tensor::empty(x.dtype.row_dtype(), layout, &shape), Tensor::empty(DType::I64, layout, &shape));
        ops::topk_logprobs(&self.run.exec(), &x.array(), axis, &logprobs.out(), &indices.out()).expect("valid arguments");
        logprobs.check_guards();
        indices.check_guards();
        let (actual, classes) = (logprobs.values(), indices.values());
        for (row, fiber) in rows_of(&shape, axis).iter().zip(fibers) {
            let Some(softmax) = Softmax::of(fiber) else { continue };
            let mut order: Vec<usize> = (0..fiber.len()).collect();
            order.sort_by(|&a, &b| fiber[b].total_cmp(&fiber[a]).then(a.cmp(&b)));
            // −0 equals 0.
            let same = |a: usize, b: usize| fiber[a] == fiber[b];
            for (&at, &class) in row.iter().zip(&order) {
                assert!(same(classes[at] as usize, class), "class {} for {class}: {self:?}", classes[at]);
                near(logprobs.dtype, actual[at], softmax.log_p(fiber[class]), 0.0, &("topk", at, self));
            }
        }
    }

    fn check_kl(&self, p: &Tensor, axis: usize, rows: &[Vec<usize>], fibers: &[Vec<f64>]) {
        let q = self.others.reals(self.y.float(), self.y.readable(), &p.shape);
        let double = p.dtype == DType::F64 || q.dtype == DType::F64;
        let float = if double { DType::F64 } else { DType::F32 };
        let temperature = self.temperature.of(&[1.0, 2.0, 0.5, 3.0]);
        let values = q.values();
        let mut losses = Tensor::empty(float, self.out.writable(), &without(&p.shape, axis));
        let mut gradient = if self.in_place {
            Tensor::floats(q.dtype, self.out.writable(), &q.shape, &values)
        } else {
            Tensor::empty(q.dtype, Layout::C, &q.shape)
        };
        {
            let out = gradient.out();
            let q = if self.in_place { out.array().clone() } else { q.array() };
            let (losses, grad) = (losses.out(), Grad { out, grad_output: GradOutput::Scalar(1.0) });
            ops::kl_divergence(&self.run.exec(), &p.array(), &q, axis, temperature, Reduction::None, Some(&losses), Some(&grad))
                .expect("valid arguments");
        }
        losses.check_guards();
        gradient.check_guards();
        let (losses, gradient) = (losses.values(), gradient.values());
        for (r, row) in rows.iter().enumerate() {
            let scaled = |x: f64| x / temperature;
            let fp: Vec<f64> = fibers[r].iter().map(|&x| scaled(x)).collect();
            let fq: Vec<f64> = row.iter().map(|&at| scaled(values[at])).collect();
            let (Some(sp), Some(sq)) = (Softmax::of(&fp), Softmax::of(&fq)) else {
                assert!(row.is_empty() || losses[r].is_nan(), "row {r}: {}: {self:?}", losses[r]);
                continue;
            };
            assert!(losses[r] >= -1e-6, "row {r}: {}: {self:?}", losses[r]);
            // Far from 0, float64 loops lose the digits that the core keeps.
            if sp.max.abs() > 1e6 || sq.max.abs() > 1e6 {
                continue;
            }
            let (mut expected, mut size) = (0.0, 0.0);
            for (&x, &y) in fp.iter().zip(&fq) {
                let (a, b) = (sp.log_p(x), sq.log_p(y));
                if y == f64::NEG_INFINITY && x > f64::NEG_INFINITY {
                    // Infinitely far, however small its share of P.
                    expected = f64::INFINITY;
                } else if a > -700.0 {
                    expected += a.exp() * (a - b);
                    size += a.exp() * (a.abs() + b.abs());
                }
            }
            near(float, losses[r], expected, size, &("kl", r, self));
            for (c, &at) in row.iter().enumerate() {
                let (a, b) = (sp.log_p(fp[c]).exp(), sq.log_p(fq[c]).exp());
                near(q.dtype, gradient[at], (b - a) / temperature, a + b, &("kl gradient", at, self));
            }
        }
    }
}
