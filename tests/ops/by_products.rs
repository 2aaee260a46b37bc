//! Scores of tokens, top-k log-probabilities and KL divergence against plain loops: every level × element type × layout × length.

use crossent::array::DType;
use crossent::ops::{self, Error, Exec, Grad, GradOutput, Reduction, Scores};

use super::oracle::{Row, sum};
use super::tensor::{FLOATS, INTS, Layout, READABLE, Tensor, WRITABLE, ulp};
use super::{Random, close, lengths, levels, random_logits, rows_of, skipped, without};

struct Scored {
    floats: [Tensor; 3],
    ints: [Tensor; 3],
}

impl Scored {
    fn new(dtype: DType, rows: &[usize]) -> Self {
        let of = |dtype| Tensor::empty(dtype, Layout::C, rows);
        Self { floats: [dtype, dtype, dtype].map(|dtype| of(dtype.row_dtype())), ints: [of(DType::I64), of(DType::I64), of(DType::Bool)] }
    }

    fn run(&mut self, exec: &Exec, x: &Tensor, axis: usize, tokens: &Tensor, ignore: Option<i64>, optional: bool) -> Result<(), Error> {
        let [logprob, logsumexp, entropy] = &mut self.floats;
        let [argmax, rank, greedy] = &mut self.ints;
        let scores = Scores {
            logprob: logprob.out(),
            logsumexp: logsumexp.out(),
            argmax: argmax.out(),
            greedy: greedy.out(),
            entropy: optional.then(|| entropy.out()),
            rank: optional.then(|| rank.out()),
        };
        ops::score_tokens(exec, &x.array(), axis, &tokens.array(), ignore, &scores)
    }
}

fn entropy(row: &Row, classes: usize) -> f64 {
    sum((0..classes).filter(|&c| row.p(c) > 0.0).map(|c| -row.p(c) * row.log_p(c)))
}

fn check(exec: &Exec, x: &Tensor, axis: usize, random: &mut Random, context: &dyn Fn() -> String) {
    let (shape, values) = (&x.shape, x.values());
    let (groups, classes, rows) = (rows_of(shape, &[axis]), shape[axis], without(shape, &[axis]));
    let kind = INTS[random.below(INTS.len())];
    let small = classes.min(if kind.size() == 1 { 120 } else { 30000 });
    let tokens: Vec<i128> = groups.iter().map(|_| random.below(small) as i128).collect();
    let ignore = tokens.first().filter(|_| random.below(2) == 0).map(|&token| token as i64);
    let labels = Tensor::ints(kind, READABLE[random.below(READABLE.len())], &rows, &tokens);
    let mut scored = Scored::new(x.dtype, &rows);
    scored.run(exec, x, axis, &labels, ignore, true).unwrap();
    let k = random.below(classes + 1);
    let mut chosen = shape.clone();
    chosen[axis] = k;
    let layout = WRITABLE[random.below(WRITABLE.len())];
    let (mut best, mut order) = (Tensor::empty(x.dtype.row_dtype(), layout, &chosen), Tensor::empty(DType::I64, layout, &chosen));
    ops::topk_logprobs(exec, &x.array(), axis, &best.out(), &order.out()).unwrap();
    let chosen = rows_of(&chosen, &[axis]);
    let [logprob, logsumexp, spread] = scored.floats.each_ref().map(Tensor::values);
    let [argmax, rank, greedy] = scored.ints.each_ref().map(Tensor::values);
    let (best_values, order_values) = (best.values(), order.values());
    for (r, (group, &token)) in groups.iter().zip(&tokens).enumerate() {
        let fiber: Vec<f64> = group.iter().map(|&at| values[at]).collect();
        let row = Row::new(&fiber);
        let what = |name: &str| format!("{name} of row {r} of {}", context());
        let y = token as usize;
        if ignore == Some(token as i64) {
            assert_eq!(
                [logprob[r], logsumexp[r], spread[r], argmax[r], rank[r], greedy[r]],
                [0.0, 0.0, 0.0, -1.0, -1.0, 0.0],
                "{}",
                what("ignored")
            );
        } else {
            let dtype = x.dtype.row_dtype();
            close(dtype, 4.0, logprob[r], row.log_p(y), 0.0, &|| what("logprob"));
            close(dtype, 4.0, logsumexp[r], row.logsumexp(), row.max, &|| what("logsumexp"));
            close(dtype, 8.0, spread[r], entropy(&row, classes), 0.0, &|| what("entropy"));
            let first = fiber.iter().position(|&x| x == row.max).unwrap();
            assert_eq!(argmax[r], first as f64, "{}", what("argmax"));
            assert_eq!(greedy[r] == 1.0, first == y, "{}", what("greedy"));
            assert_eq!(rank[r], fiber.iter().filter(|&&x| x > fiber[y]).count() as f64, "{}", what("rank"));
        }
        let mut sorted: Vec<usize> = (0..classes).collect();
        sorted.sort_by(|&a, &b| fiber[b].total_cmp(&fiber[a]).then(a.cmp(&b)));
        for (i, (&at, &class)) in if k == 0 { &[][..] } else { &chosen[r] }.iter().zip(&sorted).enumerate() {
            // Zeros of both signs are equal, which the total order does not know.
            assert!(order_values[at] == class as f64 || fiber[class] == 0.0, "{}", what(&format!("class {i} of {k}")));
            close(x.dtype.row_dtype(), 4.0, best_values[at], row.log_p(class), 0.0, &|| what("top"));
        }
    }
    for tensor in scored.floats.iter().chain(&scored.ints).chain([&best, &order]) {
        tensor.check_guards();
    }
}

/// KL of rows that the oracle can tell apart from 0, with its gradient, into an array of its own and in place.
fn check_kl(exec: &Exec, p: &Tensor, q: &Tensor, axis: usize, out: Layout, context: &dyn Fn() -> String) {
    let dtype = if p.dtype == DType::F64 { p.dtype } else { q.dtype.row_dtype() };
    let (groups, rows) = (rows_of(&p.shape, &[axis]), without(&p.shape, &[axis]));
    let (p_values, q_values) = (p.values(), q.values());
    let mut kl = Tensor::empty(dtype, Layout::C, &rows);
    let mut grad = Tensor::empty(q.dtype, out, &p.shape);
    let up = GradOutput::Scalar(-1.0);
    ops::kl_divergence(
        exec,
        &p.array(),
        &q.array(),
        axis,
        1.0,
        Reduction::None,
        Some(&kl.out()),
        Some(&Grad { out: grad.out(), grad_output: up.clone() }),
    )
    .unwrap();
    let mut place = Tensor::floats(q.dtype, out, &q.shape, &q_values);
    {
        let out = place.out();
        let q = out.array().clone();
        ops::kl_divergence(exec, &p.array(), &q, axis, 1.0, Reduction::Sum, None, Some(&Grad { out, grad_output: up })).unwrap();
    }
    assert_eq!(place.bits(), grad.bits(), "in place: {}", context());
    let (losses, gradients) = (kl.values(), grad.values());
    for (r, group) in groups.iter().enumerate() {
        let fibers: [Vec<f64>; 2] = [&p_values, &q_values].map(|values| group.iter().map(|&at| values[at]).collect());
        let [a, b] = [Row::new(&fibers[0]), Row::new(&fibers[1])];
        // A class that Q alone excludes is infinitely far, however small p is; one without mass adds nothing.
        let excluded = |c: usize| !b.bad && fibers[1][c] == f64::NEG_INFINITY && fibers[0][c] > f64::NEG_INFINITY;
        let term = |c: usize| if excluded(c) { f64::INFINITY } else { a.p(c) * (a.log_p(c) - b.log_p(c)) };
        let terms: Vec<f64> = (0..group.len()).filter(|&c| a.bad || excluded(c) || a.p(c) > 0.0).map(term).collect();
        // What the plain sum of the oracle loses.
        let size: f64 = terms.iter().map(|x| x.abs()).sum::<f64>() * 4.0 * f64::EPSILON;
        let (exact, actual) = (sum(terms), losses[r]);
        if exact.is_finite() {
            let bound = 64.0 * ulp(dtype, exact) + size + 1e-13;
            assert!((actual - exact).abs() <= bound && actual >= 0.0, "row {r} of {}: {actual:e}, expected {exact:e}", context());
        } else {
            assert!(actual == exact || actual.is_nan() && exact.is_nan(), "row {r} of {}: {actual:e}, expected {exact:e}", context());
        }
        for (c, &at) in group.iter().enumerate() {
            let size = a.p(c).max(b.p(c));
            close(q.dtype, 8.0, gradients[at], a.p(c) - b.p(c), size, &|| format!("gradient {c} of row {r} of {}", context()));
        }
    }
    kl.check_guards();
    grad.check_guards();
    place.check_guards();
}

#[test]
fn every_length_type_and_layout() {
    for level in levels() {
        let mut random = Random(41);
        for classes in lengths() {
            for dtype in FLOATS {
                let layout = READABLE[random.below(READABLE.len())];
                let (shape, axis): (Vec<usize>, usize) = match random.below(4) {
                    0 => (vec![3, classes], 1),
                    1 => (vec![classes, 3], 0),
                    2 => (vec![2, classes, 3], 1),
                    _ => (vec![classes], 0),
                };
                let exec = Exec { level, threads: 1 + random.below(3) };
                let x = random_logits(&mut random, dtype, layout, &shape, &[axis]);
                let context = || format!("{dtype:?} {layout:?} {shape:?} axis {axis} {level:?}");
                check(&exec, &x, axis, &mut random, &context);
                let other = READABLE[random.below(READABLE.len())];
                let q_dtype = if random.below(4) == 0 { FLOATS[random.below(4)] } else { dtype };
                let q = random_logits(&mut random, q_dtype, other, &shape, &[axis]);
                let out = WRITABLE[random.below(WRITABLE.len())];
                check_kl(&exec, &x, &q, axis, out, &|| format!("{} beside {q_dtype:?} {other:?} into {out:?}", context()));
            }
        }
    }
}

#[test]
fn the_same_bits_for_every_number_of_threads() {
    let shapes: [(&[usize], usize); 4] = [(&[30011, 10], 1), (&[257, 513], 1), (&[2, 21, 40, 50], 1), (&[1000, 131], 0)];
    for level in levels() {
        let mut random = Random(42);
        let mut count = 0;
        for dtype in FLOATS {
            for (shape, axis) in shapes {
                if skipped(&mut count) {
                    continue;
                }
                let [p, q] = [0, 1].map(|_| random_logits(&mut random, dtype, Layout::C, shape, &[axis]));
                let rows = without(shape, &[axis]);
                let count = rows.iter().product::<usize>();
                let tokens = Tensor::ints(DType::I32, Layout::C, &rows, &(0..count).map(|r| (r % shape[axis]) as i128).collect::<Vec<_>>());
                let mut chosen = shape.to_vec();
                chosen[axis] = 3;
                let run = |threads: usize| {
                    let exec = Exec { level, threads };
                    let mut scored = Scored::new(dtype, &rows);
                    scored.run(&exec, &p, axis, &tokens, Some(2), true).unwrap();
                    let mut best = Tensor::empty(dtype.row_dtype(), Layout::C, &chosen);
                    let mut order = Tensor::empty(DType::I64, Layout::C, &chosen);
                    ops::topk_logprobs(&exec, &p.array(), axis, &best.out(), &order.out()).unwrap();
                    let mut grad = Tensor::empty(dtype, Layout::C, shape);
                    let target = Grad { out: grad.out(), grad_output: GradOutput::Scalar(1.0) };
                    let mean = ops::kl_divergence(&exec, &p.array(), &q.array(), axis, 2.0, Reduction::Mean, None, Some(&target)).unwrap();
                    let all: Vec<Vec<u64>> =
                        scored.floats.iter().chain(&scored.ints).chain([&best, &order, &grad]).map(Tensor::bits).collect();
                    (mean.to_bits(), all)
                };
                let one = run(1);
                for threads in [2, 3] {
                    assert!(one == run(threads), "{dtype:?} {shape:?} {level:?} with {threads} threads");
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let exec = Exec { level: levels()[0], threads: 2 };
    let x = Tensor::floats(DType::F32, Layout::C, &[4, 5], &[0.0; 20]);
    let mut scored = Scored::new(DType::F32, &[4]);
    let tokens = Tensor::ints(DType::I64, Layout::C, &[4], &[0, 1, 5, 2]);
    let untouched = scored.floats[0].bits();
    let error = scored.run(&exec, &x, 1, &tokens, None, true).unwrap_err();
    assert_eq!(error, Error::TargetOutOfBounds { argument: "tokens", position: 2, value: 5 });
    assert_eq!(scored.floats[0].bits(), untouched);
    scored.run(&exec, &x, 1, &tokens, Some(5), false).unwrap();

    let invalid = |result: Result<f64, Error>| assert!(matches!(result, Err(Error::Invalid(_))));
    assert!(scored.run(&exec, &x, 2, &tokens, None, true).is_err());
    assert!(scored.run(&exec, &x, 0, &tokens, None, true).is_err());
    let (mut best, mut order) = (Tensor::empty(DType::F32, Layout::C, &[4, 6]), Tensor::empty(DType::I64, Layout::C, &[4, 6]));
    assert!(ops::topk_logprobs(&exec, &x.array(), 1, &best.out(), &order.out()).is_err());
    let q = Tensor::floats(DType::F32, Layout::C, &[5, 4], &[0.0; 20]);
    invalid(ops::kl_divergence(&exec, &x.array(), &q.array(), 1, 1.0, Reduction::Sum, None, None));
    let mut rows = Tensor::empty(DType::F64, Layout::C, &[4]);
    invalid(ops::kl_divergence(&exec, &x.array(), &x.array(), 1, 1.0, Reduction::None, Some(&rows.out()), None));
}
