//! Losses and their gradients.

use crossent::array::DType;
use crossent::ops::{self, Exec, Grad, GradOutput, LossOptions, Reduction, Target};
use proptest::prelude::*;

use super::case::Choice;
use super::oracle::{self, Row};
use super::tensor::{FLOATS, INTS, Layout, READABLE, Tensor, WRITABLE, ulp};
use super::transforms::check_transforms;
use super::{Random, close, lengths, levels, rows_of, skipped, thin, without};

pub const SMOOTHINGS: [f64; 3] = [0.0, 0.1, 1.0];
pub const REDUCTIONS: [Reduction; 3] = [Reduction::Mean, Reduction::Sum, Reduction::None];

#[test]
fn losses_of_every_combination() {
    let weights = [None, Some(DType::F32), Some(DType::F64), Some(DType::I32)];
    for level in levels() {
        let mut seed = 0;
        for dtype in FLOATS {
            for layout in READABLE {
                for (shape, axis) in [(&[19, 5][..], 1), (&[5, 19], 0), (&[3, 7, 4], 1)] {
                    for reduction in REDUCTIONS {
                        for smoothing in SMOOTHINGS {
                            for weight in weights {
                                for ignored in [0, 3] {
                                    // Target types take turns: integers in three of four cases, each type as often as another.
                                    if skipped(&mut seed) {
                                        continue;
                                    }
                                    let target = if seed % 4 == 0 { FLOATS[seed / 4 % 4] } else { INTS[seed % 8] };
                                    let choice = Choice {
                                        dtype,
                                        layout,
                                        out_layout: WRITABLE[seed % 6],
                                        shape: shape.to_vec(),
                                        axis,
                                        target,
                                        weight,
                                        smoothing,
                                        ignored,
                                        reduction,
                                        grad_rows: seed % 2 == 0,
                                        seed: seed as u64,
                                    };
                                    choice.build().check(&Exec { level, threads: 1 + seed % 3 });
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn losses_of_every_length() {
    for level in levels() {
        let mut random = Random(5);
        for dtype in FLOATS {
            for classes in lengths() {
                for target in [DType::I64, DType::F32] {
                    for smoothing in [0.0, 0.1] {
                        // 17 and 33 rows: whole tiles of rows and one more.
                        let n = if classes > 70 { 3 } else { [1, 17, 33][random.below(3)] };
                        for (shape, axis) in [(vec![n, classes], 1), (vec![classes, n], 0)] {
                            let choice = Choice {
                                dtype,
                                layout: if random.below(2) == 0 { Layout::C } else { READABLE[random.below(READABLE.len())] },
                                out_layout: if random.below(2) == 0 { Layout::C } else { WRITABLE[random.below(WRITABLE.len())] },
                                shape,
                                axis,
                                target,
                                weight: (random.below(2) == 0).then_some(DType::F32),
                                smoothing,
                                ignored: [0, 4][random.below(2)],
                                reduction: REDUCTIONS[random.below(3)],
                                grad_rows: true,
                                seed: random.next(),
                            };
                            choice.build().check(&Exec { level, threads: 2 });
                        }
                    }
                }
            }
        }
    }
}

fn choices() -> impl Strategy<Value = Choice> {
    let shape = prop_oneof![
        3 => prop::collection::vec(1usize..=12, 1..=4),
        1 => (1usize..=4, 60usize..=1100).prop_map(|(n, c)| vec![n, c]),
        1 => (60usize..=1100, 1usize..=40).prop_map(|(c, n)| vec![c, n]),
    ];
    let kinds = (
        prop::sample::select(FLOATS.to_vec()),
        prop::sample::select(READABLE.to_vec()),
        prop::sample::select(WRITABLE.to_vec()),
        prop::sample::select([&INTS[..], &FLOATS[..]].concat()),
        prop::option::of(prop::sample::select(vec![DType::F32, DType::F64, DType::F16, DType::Bf16, DType::I64, DType::U8])),
    );
    let options = (
        prop_oneof![Just(0.0), Just(1.0), 0.0..1.0f64],
        0usize..=4,
        prop::sample::select(REDUCTIONS.to_vec()),
        any::<bool>(),
        any::<u64>(),
    );
    (shape, any::<prop::sample::Index>(), kinds, options).prop_map(|(shape, axis, kinds, options)| {
        let (dtype, layout, out_layout, target, weight) = kinds;
        let (smoothing, ignored, reduction, grad_rows, seed) = options;
        let axis = axis.index(shape.len());
        Choice { dtype, layout, out_layout, shape, axis, target, weight, smoothing, ignored, reduction, grad_rows, seed }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if thin() { 64 } else { 512 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn losses_of_any_choice(choice in choices(), threads in 1usize..=3) {
        let case = choice.build();
        for level in levels() {
            case.check(&Exec { level, threads });
        }
    }

    #[test]
    fn transforms_of_any_choice(choice in choices(), threads in 1usize..=3) {
        let case = choice.build();
        for level in levels() {
            let exec = Exec { level, threads };
            check_transforms(&exec, &case.x, &[case.axis], case.out_layout, &|| format!("{choice:?} with {exec:?}"));
        }
    }
}

/// One call on C-ordered logits with 64-bit labels: rows and gradient (`Reduction::None`).
pub fn simple(
    exec: &Exec,
    dtype: DType,
    shape: &[usize],
    axis: usize,
    x: &[f64],
    y: &[i128],
    options: &LossOptions,
) -> (Vec<f64>, Vec<f64>) {
    simple_scaled(exec, dtype, shape, axis, x, y, options, 1.0)
}

/// The same with gradients times `g`.
#[allow(clippy::too_many_arguments)]
fn simple_scaled(
    exec: &Exec,
    dtype: DType,
    shape: &[usize],
    axis: usize,
    x: &[f64],
    y: &[i128],
    options: &LossOptions,
    g: f64,
) -> (Vec<f64>, Vec<f64>) {
    let x = Tensor::floats(dtype, Layout::C, shape, x);
    let row_shape = without(shape, &[axis]);
    let target = Tensor::ints(DType::I64, Layout::C, &row_shape, y);
    let mut rows = Tensor::empty(dtype.row_dtype(), Layout::C, &row_shape);
    let mut gradient = Tensor::empty(dtype, Layout::C, shape);
    {
        let out = rows.out();
        let grad = Grad { out: gradient.out(), grad_output: GradOutput::Scalar(g) };
        let options = LossOptions { reduction: Reduction::None, ..options.clone() };
        ops::cross_entropy(exec, &x.array(), axis, &Target::Index(target.array()), &options, Some(&out), Some(&grad)).unwrap();
    }
    (rows.values(), gradient.values())
}

/// One maximum, or two that are equal, in every part of a row, with a mask of nothing and without: counted twice or not at all, either would be
/// the whole loss.
#[test]
fn the_maximum_wherever_it_stands() {
    const BELOW: f64 = 30.0;
    for level in levels() {
        for dtype in FLOATS {
            for classes in [300usize, 1000, 1100, 2600, 4300] {
                if thin() && classes > 1100 {
                    continue;
                }
                let places: Vec<(usize, usize)> = (0..classes).step_by(61).flat_map(|p| [(p, p), (p, (p + 397) % classes)]).collect();
                let n = places.len();
                let mut x = vec![-BELOW; n * classes];
                for (r, &(p, q)) in places.iter().enumerate() {
                    (x[r * classes + p], x[r * classes + q]) = (0.0, 0.0);
                }
                let labels: Vec<i128> = places.iter().map(|&(p, _)| p as i128).collect();
                let all = Tensor::ints(DType::Bool, Layout::C, &[n, classes], &vec![1; n * classes]);
                for mask in [None, Some(all.array())] {
                    let options = LossOptions { mask, ..LossOptions::default() };
                    let (losses, gradients) = simple(&Exec { level, threads: 1 }, dtype, &[n, classes], 1, &x, &labels, &options);
                    for (r, &(p, q)) in places.iter().enumerate() {
                        let ties = if p == q { 1.0 } else { 2.0 };
                        let others = (ties - 1.0) + (classes as f64 - ties) * (-BELOW).exp();
                        let context = format!("maxima {p} and {q} of {classes} {dtype:?} {level:?}");
                        assert!((losses[r] / others.ln_1p() - 1.0).abs() < 1e-6, "{} for {}: {context}", losses[r], others.ln_1p());
                        let slope = -others / (1.0 + others);
                        let tolerance = slope.abs() * 1e-6 + ulp(dtype, slope);
                        assert!((gradients[r * classes + p] - slope).abs() <= tolerance, "{context}: {}", gradients[r * classes + p]);
                    }
                }
            }
        }
    }
}

/// Rows of eight blocks with the maximum, a second one like it or a smaller one before it, and the target in any of them: blocks without any of these are read in
/// one run, which must not pass them by.
#[test]
fn long_rows_with_the_target_in_any_block() {
    const BLOCK: usize = 1024;
    const CLASSES: usize = 7 * BLOCK + 30;
    let peaks: [&[(usize, f64)]; 6] = [
        &[(5, 6.0)],
        &[(2 * BLOCK + 700, 6.0)],
        &[(5 * BLOCK + 5, 6.0), (6 * BLOCK - 1, 6.0)],
        &[(BLOCK, 6.0), (4 * BLOCK + 5, 6.0), (CLASSES - 1, 6.0)],
        &[(0, 3.75), (3 * BLOCK + 511, 5.0), (6 * BLOCK + 700, 6.0)],
        &[(7, 5.0), (3 * BLOCK, 5.0), (4 * BLOCK + 5, 6.0), (4 * BLOCK + 900, 6.0)],
    ];
    let targets: Vec<usize> = (0..8).flat_map(|block| [block * BLOCK + 5, (block * BLOCK + 700).min(CLASSES - 1)]).collect();
    for level in levels() {
        for dtype in FLOATS {
            for (kind, &peaks) in peaks.iter().chain(&peaks).enumerate() {
                if thin() && kind % 4 > 0 {
                    continue;
                }
                // Confident rows as well, whose losses are as small as what is beside the maximum.
                let down = if kind < 6 { 0.0 } else { 32.0 };
                let mut row: Vec<f64> = (0..CLASSES).map(|c| (c * 37 % 31) as f64 / 4.0 - 4.0 - down).collect();
                for &(class, logit) in peaks {
                    row[class] = logit - down * (6.0 - logit) / 4.0;
                }
                let (top, below): (Vec<f64>, Vec<f64>) = row.iter().partition(|&&x| x == 6.0);
                let others = (top.len() - 1) as f64 + below.iter().map(|x| (x - 6.0).exp()).sum::<f64>();
                let x = row.repeat(targets.len());
                let (shape, labels): (_, Vec<i128>) = ([targets.len(), CLASSES], targets.iter().map(|&t| t as i128).collect());
                let exec = Exec { level, threads: 1 };
                let (losses, gradients) = simple(&exec, dtype, &shape, 1, &x, &labels, &LossOptions::default());
                let mut alone = Tensor::empty(dtype.row_dtype(), Layout::C, &shape[..1]);
                {
                    let (x, y) = (Tensor::floats(dtype, Layout::C, &shape, &x), Tensor::ints(DType::I64, Layout::C, &shape[..1], &labels));
                    let options = LossOptions { reduction: Reduction::None, ..LossOptions::default() };
                    let out = alone.out();
                    ops::cross_entropy(&exec, &x.array(), 1, &Target::Index(y.array()), &options, Some(&out), None).unwrap();
                }
                for (r, &target) in targets.iter().enumerate() {
                    let context = format!("peaks {peaks:?}, target {target}, {dtype:?} {level:?}");
                    let loss = others.ln_1p() + (6.0 - row[target]);
                    assert!((losses[r] / loss - 1.0).abs() < 1e-6, "{} for {loss}: {context}", losses[r]);
                    assert_eq!(losses[r], alone.values()[r], "without a gradient: {context}");
                    for (c, x) in row.iter().enumerate() {
                        let p = (x - 6.0).exp() / (1.0 + others);
                        let slope = if c != target {
                            p
                        } else if *x == 6.0 {
                            -others / (1.0 + others)
                        } else {
                            p - 1.0
                        };
                        let got = gradients[r * CLASSES + c];
                        assert!((got - slope).abs() <= 2e-6 * slope.abs() + ulp(dtype, slope), "class {c}, {got} for {slope}: {context}");
                    }
                }
            }
        }
    }
}

/// Few classes go ways of their own, and so does the temperature in each.
#[test]
fn temperatures_of_few_classes() {
    for level in levels() {
        for dtype in FLOATS {
            for classes in [2usize, 3, 5, 17, 33, 70] {
                for temperature in [0.25, 3.0] {
                    let mut random = Random(classes as u64 + 7);
                    let n = 41;
                    // Multiples of 1/8, which every type has.
                    let x: Vec<f64> = (0..n * classes).map(|_| random.below(48) as f64 / 8.0 - 3.0).collect();
                    let labels: Vec<i128> = (0..n).map(|_| random.below(classes) as i128).collect();
                    let options = LossOptions { temperature, ..LossOptions::default() };
                    let (losses, gradients) = simple(&Exec { level, threads: 1 }, dtype, &[n, classes], 1, &x, &labels, &options);
                    for (r, &label) in labels.iter().enumerate() {
                        let row: Vec<f64> = x[r * classes..][..classes].iter().map(|x| x / temperature).collect();
                        let sum: f64 = row.iter().map(|x| x.exp()).sum();
                        let context = format!("row {r}, {classes} classes, temperature {temperature}, {dtype:?} {level:?}");
                        let loss = sum.ln() - row[label as usize];
                        assert!((losses[r] - loss).abs() <= 4e-6 * loss.abs().max(0.1), "{} for {loss}: {context}", losses[r]);
                        for (c, x) in row.iter().enumerate() {
                            let slope = (x.exp() / sum - f64::from(u8::from(c as i128 == label))) / temperature;
                            let got = gradients[r * classes + c];
                            assert!((got - slope).abs() <= 2e-6 + ulp(dtype, slope), "class {c}, {got} for {slope}: {context}");
                        }
                    }
                }
            }
        }
    }
}

/// Targets on what was the maximum until a larger one came: they go on with the distances of all others.
#[test]
fn targets_on_maxima_that_were() {
    for level in levels() {
        for dtype in FLOATS {
            for blocks in [2usize, 4] {
                let classes = 1024 * blocks;
                let x: Vec<f64> = (0..classes).map(|c| (c / 1024) as f64 * 50.0).collect();
                let options = LossOptions { label_smoothing: 1.0, ..LossOptions::default() };
                let (losses, _) = simple(&Exec { level, threads: 1 }, dtype, &[1, classes], 1, &x, &[5], &options);
                let expected = (blocks - 1) as f64 * 25.0 + 1024f64.ln();
                assert!((losses[0] / expected - 1.0).abs() < 1e-6, "{} for {expected}: {blocks} blocks, {dtype:?} {level:?}", losses[0]);
            }
        }
    }
}

/// Beyond the classes whose exponentials are kept, those of halves are computed again, less the targets of all classes.
#[test]
fn smoothing_of_very_long_rows() {
    const G: f64 = 4096.0;
    for level in levels() {
        for dtype in FLOATS {
            let (classes, smoothing) = (66_000usize, 0.5);
            let mut x = vec![0.0; classes];
            (x[3], x[65_990]) = (8.0, -1.0);
            let options = LossOptions { label_smoothing: smoothing, ..LossOptions::default() };
            let (_, gradients) = simple_scaled(&Exec { level, threads: 1 }, dtype, &[1, classes], 1, &x, &[7], &options, G);
            let sum = (classes - 2) as f64 + 8f64.exp() + (-1f64).exp();
            for c in [0usize, 3, 7, 1024, 65_535, 65_990, 65_999] {
                let target = smoothing / classes as f64 + if c == 7 { 1.0 - smoothing } else { 0.0 };
                let slope = G * (x[c].exp() / sum - target);
                let tolerance = 1e-4 * slope.abs() + ulp(dtype, slope);
                assert!((gradients[c] - slope).abs() <= tolerance, "class {c}: {} for {slope}, {dtype:?} {level:?}", gradients[c]);
            }
        }
    }
}

/// Thousands of rows of few classes, most of them confident: every rounding on the way to a small loss is one of its own digits.
#[test]
fn small_losses_of_few_classes_keep_their_digits() {
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        let mut random = Random(77);
        for classes in [2usize, 3, 5, 10, 16, 21, 32, 33, 64] {
            let rows = if thin() { 200 } else { 2000 };
            let mut values: Vec<f64> = (0..rows * classes).map(|_| f64::from((random.uniform() * 6.0) as f32)).collect();
            let labels: Vec<i128> = (0..rows).map(|r| (r % classes) as i128).collect();
            for (row, &label) in values.chunks_exact_mut(classes).zip(&labels) {
                row[label as usize] = f64::from((6.0 + random.uniform() * 20.0) as f32);
            }
            let strided: Vec<f64> = (0..rows * classes).map(|i| values[i % rows * classes + i / rows]).collect();
            for (axis, shape, x) in [(1, [rows, classes], &values), (0, [classes, rows], &strided)] {
                let (losses, gradient) = simple(&exec, DType::F32, &shape, axis, x, &labels, &LossOptions::default());
                for (r, row) in values.chunks_exact(classes).enumerate() {
                    let (exact, label) = (Row::new(row), labels[r] as usize);
                    let mut mass = vec![0.0; classes];
                    mass[label] = 1.0;
                    let context = || format!("row {r} of {classes} classes, axis {axis}, {level:?}");
                    close(DType::F32, 4.0, losses[r], exact.loss(&mass), 0.0, &|| format!("loss of {}", context()));
                    for c in 0..classes {
                        let (expected, size) = exact.gradient(&mass, c);
                        let at = if axis == 1 { r * classes + c } else { c * rows + r };
                        close(DType::F32, 8.0, gradient[at], expected, size, &|| format!("gradient {c} of {}", context()));
                    }
                }
            }
        }
    }
}

#[test]
fn special_rows_of_losses() {
    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;
    for level in levels() {
        let exec = Exec { level, threads: 2 };
        for dtype in FLOATS {
            for classes in [2usize, 3, 5, 16, 40, 65, 600] {
                for label in [0, 1, classes - 1] {
                    for odd_at in [0, 1, classes / 2, classes - 1] {
                        for (fill, odd) in [
                            (0.0, NAN),
                            (0.0, INF),
                            (-INF, INF),
                            (INF, INF),
                            (-INF, NAN),
                            (-INF, -INF),
                            (0.0, -INF),
                            (-INF, 0.0),
                            (2.0, 2.0),
                            (1.0, 20.0),
                        ] {
                            let mut row = vec![fill; classes];
                            row[odd_at] = odd;
                            let exact = Row::new(&row);
                            for smoothing in [0.0, 0.1] {
                                let mut mass = vec![smoothing / classes as f64; classes];
                                mass[label] += 1.0 - smoothing;
                                for (shape, axis) in [([1, classes], 1), ([classes, 1], 0)] {
                                    let options = LossOptions { label_smoothing: smoothing, ..LossOptions::default() };
                                    let (loss, gradient) = simple(&exec, dtype, &shape, axis, &row, &[label as i128], &options);
                                    let context = || {
                                        format!(
                                            "{dtype:?} {fill} with {odd} at {odd_at}, label {label} of {classes}, smoothing {smoothing}, {level:?}, axis {axis}"
                                        )
                                    };
                                    close(dtype.row_dtype(), 4.0, loss[0], exact.loss(&mass), 0.0, &|| format!("loss {}", context()));
                                    for (c, &g) in gradient.iter().enumerate() {
                                        let (expected, size) = exact.gradient(&mass, c);
                                        close(dtype, 8.0, g, expected, size, &|| format!("gradient {c} {}", context()));
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn confident_rows_keep_their_digits() {
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        for x in [[20.0, 0.0], [10020.0, 10000.0]] {
            let (loss, gradient) = simple(&exec, DType::F32, &[1, 2], 1, &x, &[0], &LossOptions::default());
            let exact = (-20f64).exp().ln_1p();
            assert!((loss[0] / exact - 1.0).abs() < 4e-7, "{level:?}: {}", loss[0]);
            let p = 1.0 / (1.0 + 20f64.exp());
            assert!((gradient[0] / -p - 1.0).abs() < 8e-7 && (gradient[1] / p - 1.0).abs() < 8e-7, "{level:?}: {gradient:?}");
        }
    }
}

#[test]
fn the_divisor_of_the_mean() {
    for level in levels() {
        let exec = Exec { level, threads: 2 };
        let x = Tensor::floats(DType::F32, Layout::C, &[3, 2], &[0.0, 1.0, 2.0, 0.0, 1.0, 1.0]);
        let run = |labels: &[i128], weight: &[f64], reduction: Reduction| {
            let y = Tensor::ints(DType::I64, Layout::C, &[3], labels);
            let w = Tensor::floats(DType::F32, Layout::C, &[2], weight);
            let mut out = Tensor::empty(DType::F32, Layout::C, &[3, 2]);
            let loss = {
                let grad = Grad { out: out.out(), grad_output: GradOutput::Scalar(1.0) };
                let options = LossOptions { weight: Some(w.array()), reduction, ..LossOptions::default() };
                ops::cross_entropy(&exec, &x.array(), 1, &Target::Index(y.array()), &options, None, Some(&grad)).unwrap()
            };
            (loss, out.values())
        };
        let (loss, gradient) = run(&[-100; 3], &[1.0, 1.0], Reduction::Mean);
        assert!(loss.is_nan() && gradient == [0.0; 6], "all ignored: {loss} {gradient:?}");
        let (loss, gradient) = run(&[-100; 3], &[1.0, 1.0], Reduction::Sum);
        assert!(loss == 0.0 && gradient == [0.0; 6], "all ignored: {loss} {gradient:?}");
        let (loss, gradient) = run(&[0; 3], &[0.0, 1.0], Reduction::Mean);
        assert!(loss.is_nan() && gradient.iter().all(|g| g.is_nan()), "no weight: {loss} {gradient:?}");
        let (loss, gradient) = run(&[0; 3], &[0.0, 1.0], Reduction::Sum);
        assert!(loss == 0.0 && gradient == [0.0; 6], "no weight: {loss} {gradient:?}");
    }
}

#[test]
fn zero_weight_on_an_impossible_class_costs_nothing() {
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        let w = Tensor::floats(DType::F32, Layout::C, &[3], &[1.0, 0.0, 2.0]);
        let options = LossOptions { weight: Some(w.array()), label_smoothing: 0.3, ..LossOptions::default() };
        let x = [0.5, f64::NEG_INFINITY, 1.0];
        let (loss, gradient) = simple(&exec, DType::F32, &[1, 3], 1, &x, &[2], &options);
        let mass = [0.1, 0.0, 2.0 * 0.8];
        let row = Row::new(&x);
        close(DType::F32, 4.0, loss[0], row.loss(&mass), 0.0, &|| format!("loss at {level:?}"));
        for (c, &g) in gradient.iter().enumerate() {
            let (expected, size) = row.gradient(&mass, c);
            close(DType::F32, 8.0, g, expected, size, &|| format!("gradient {c} at {level:?}"));
        }
    }
}

#[test]
fn nll() {
    for level in levels() {
        let mut random = Random(7);
        for dtype in FLOATS {
            for (shape, axis) in [(&[19, 5][..], 1), (&[5, 19], 0), (&[3, 70, 4], 1), (&[2, 600], 1), (&[9], 0)] {
                for layout in READABLE {
                    for reduction in REDUCTIONS {
                        let exec = Exec { level, threads: 1 + random.below(3) };
                        let classes = shape[axis];
                        let groups = rows_of(shape, &[axis]);
                        let row_shape = without(shape, &[axis]);
                        let lp: Vec<f64> = (0..shape.iter().product()).map(|_| -5.0 * random.uniform()).collect();
                        let lp = Tensor::floats(dtype, layout, shape, &lp);
                        let labels: Vec<i128> =
                            groups.iter().map(|_| if random.below(4) == 0 { -1 } else { random.below(classes) as i128 }).collect();
                        let int = [DType::I8, DType::I16, DType::I32, DType::I64][random.below(4)];
                        let labels: Vec<i128> = labels.iter().map(|&y| if int == DType::I8 { y.min(127) } else { y }).collect();
                        let target = Tensor::ints(int, Layout::C, &row_shape, &labels);
                        let w = Tensor::floats(
                            DType::F64,
                            Layout::C,
                            &[classes],
                            &(0..classes).map(|_| 0.5 + random.uniform()).collect::<Vec<_>>(),
                        );
                        let out_layout = WRITABLE[random.below(WRITABLE.len())];
                        let mut rows = Tensor::empty(dtype.row_dtype(), out_layout, &row_shape);
                        let mut gradient = Tensor::empty(dtype, out_layout, shape);
                        let loss = {
                            let out = rows.out();
                            let grad = Grad { out: gradient.out(), grad_output: GradOutput::Scalar(0.75) };
                            let options =
                                LossOptions { weight: Some(w.array()), ignore_index: Some(-1), reduction, ..LossOptions::default() };
                            let out = (reduction == Reduction::None).then_some(&out);
                            ops::nll_loss(&exec, &lp.array(), axis, &target.array(), &options, out, Some(&grad)).unwrap()
                        };
                        rows.check_guards();
                        gradient.check_guards();
                        let (lp, w, actual) = (lp.values(), w.values(), gradient.values());
                        let context = || {
                            format!("{dtype:?} {layout:?} {shape:?} axis {axis} {int:?} {reduction:?} into {out_layout:?} with {exec:?}")
                        };
                        let kept: Vec<usize> = (0..labels.len()).filter(|&r| labels[r] >= 0).collect();
                        let divisor = oracle::sum(kept.iter().map(|&r| w[labels[r] as usize]));
                        let exact = |r: usize| if labels[r] < 0 { 0.0 } else { -w[labels[r] as usize] * lp[groups[r][labels[r] as usize]] };
                        let total = oracle::sum(kept.iter().map(|&r| exact(r)));
                        match reduction {
                            Reduction::None => {
                                for (r, &l) in rows.values().iter().enumerate() {
                                    close(dtype.row_dtype(), 4.0, l, exact(r), 0.0, &|| format!("row {r}: {}", context()));
                                }
                            }
                            Reduction::Sum => close(dtype.row_dtype(), 4.0, loss, total, 0.0, &|| format!("sum: {}", context())),
                            Reduction::Mean => {
                                close(dtype.row_dtype(), 4.0, loss, total / divisor, 0.0, &|| format!("mean: {}", context()));
                            }
                        }
                        let share = if reduction == Reduction::Mean { 0.75 / divisor } else { 0.75 };
                        for (r, group) in groups.iter().enumerate() {
                            for (c, &at) in group.iter().enumerate() {
                                let expected = if labels[r] == c as i128 { -w[c] * share } else { 0.0 };
                                close(dtype, 8.0, actual[at], expected, 0.0, &|| format!("gradient row {r} class {c}: {}", context()));
                                assert!(expected != 0.0 || actual[at] == 0.0, "not zero: {}", context());
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn broadcast_logits() {
    for level in levels() {
        let exec = Exec { level, threads: 2 };
        for dtype in FLOATS {
            let mut random = Random(8);
            let row = Tensor::floats(dtype, Layout::C, &[33], &(0..33).map(|_| random.normal()).collect::<Vec<_>>());
            let fiber = row.values();
            let exact = Row::new(&fiber);
            // The same row seven times; the same class 33 times; a whole plane repeated.
            for (x, axis, rows) in [(row.broadcast(0, 7), 1, 7), (row.broadcast(1, 7), 0, 7)] {
                let mut lse = Tensor::empty(dtype.row_dtype(), Layout::C, &[rows]);
                ops::logsumexp(&exec, &x, &[axis], &lse.out()).unwrap();
                for l in lse.values() {
                    close(lse.dtype, 4.0, l, exact.logsumexp(), exact.max, &|| format!("{dtype:?} {level:?} axis {axis}"));
                }
            }
            let flat = row.broadcast(0, 50);
            let mut p = Tensor::empty(dtype, Layout::C, &[50, 33]);
            ops::softmax(&exec, &flat, &[0], &p.out()).unwrap();
            for p in p.values() {
                close(dtype, 8.0, p, 0.02, 0.0, &|| format!("{dtype:?} {level:?} equal classes"));
            }
        }
    }
}

/// What is under False might as well not be there: the rest of the classes alone give the same, whatever the other options are.
#[test]
fn masked_classes_might_as_well_not_be_there() {
    let mut random = Random(5);
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        for (classes, rows) in [(5usize, 40usize), (31, 20), (66, 20), (130, 9), (1027, 5), (2500, 3), (7198, 3)] {
            let kept: Vec<usize> = (0..classes).filter(|c| c % 3 != 1).collect();
            let x: Vec<f64> = (0..rows * classes).map(|_| f64::from((random.uniform() * 8.0) as f32)).collect();
            let labels: Vec<i128> = (0..rows).map(|r| (r * 7 % kept.len()) as i128).collect();
            let here: Vec<i128> = labels.iter().map(|&label| kept[label as usize] as i128).collect();
            let rest: Vec<f64> = x.chunks_exact(classes).flat_map(|row| kept.iter().map(|&c| row[c])).collect();
            let flags: Vec<i128> = (0..rows * classes).map(|i| i128::from(i % classes % 3 != 1)).collect();
            let mask = Tensor::ints(DType::Bool, Layout::C, &[rows, classes], &flags);
            for (label_smoothing, softcap, z_loss) in [(0.0, None, 0.0), (0.2, None, 0.0), (0.1, Some(6.0), 1e-2), (0.0, Some(3.0), 0.0)] {
                let plain = LossOptions { label_smoothing, softcap, z_loss, ..LossOptions::default() };
                let masked = LossOptions { mask: Some(mask.array()), ..plain.clone() };
                let context = || format!("{classes} classes, smoothing {label_smoothing}, cap {softcap:?}, {level:?}");
                let (losses, gradient) = simple(&exec, DType::F32, &[rows, classes], 1, &x, &here, &masked);
                let (expected, slopes) = simple(&exec, DType::F32, &[rows, kept.len()], 1, &rest, &labels, &plain);
                for r in 0..rows {
                    close(DType::F32, 8.0, losses[r], expected[r], 0.0, &|| format!("loss {r} of {}", context()));
                    for (j, &c) in kept.iter().enumerate() {
                        let want = slopes[r * kept.len() + j];
                        close(DType::F32, 16.0, gradient[r * classes + c], want, 0.1, &|| format!("gradient {r}, {c} of {}", context()));
                    }
                    assert!((0..classes).all(|c| c % 3 != 1 || gradient[r * classes + c] == 0.0), "under False: {}", context());
                }
            }
        }
    }
}

/// A small factor makes gradients small, and takes none of their digits as long as they are normal numbers.
#[test]
fn small_gradients_keep_their_digits() {
    let mut random = Random(6);
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        for (dtype, g) in [(DType::F32, 1e-34), (DType::F32, 1e-31), (DType::F64, 1e-280)] {
            for (classes, rows) in [(3usize, 30usize), (10, 20), (40, 20), (70, 20), (1030, 4), (3100, 3)] {
                let x: Vec<f64> = (0..rows * classes).map(|_| f64::from((random.uniform() * 4.0) as f32)).collect();
                let labels: Vec<i128> = (0..rows).map(|r| (r % classes) as i128).collect();
                let strided: Vec<f64> = (0..rows * classes).map(|i| x[i % rows * classes + i / rows]).collect();
                for (axis, shape, x) in [(1, [rows, classes], &x), (0, [classes, rows], &strided)] {
                    let options = LossOptions::default();
                    let (_, expected) = simple(&exec, dtype, &shape, axis, x, &labels, &options);
                    let (_, gradient) = simple_scaled(&exec, dtype, &shape, axis, x, &labels, &options, g);
                    for (i, (&got, &want)) in gradient.iter().zip(&expected).enumerate() {
                        close(dtype, 8.0, got, want * g, 0.0, &|| {
                            format!("gradient {i}, {classes} classes, axis {axis}, {g:e}, {level:?}")
                        });
                    }
                }
            }
        }
    }
}
