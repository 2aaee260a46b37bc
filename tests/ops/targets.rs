//! Targets that are a few classes each, and options that change what a class counts, against the same written out.

use crossent::array::DType;
use crossent::ops::{self, Error, Exec, Grad, GradOutput, LossOptions, Reduction, Target};

use super::losses::simple;
use super::oracle::Row;
use super::tensor::{Layout, Tensor};
use super::{Random, close, levels, without};

/// Rows and gradient of a call.
fn both(exec: &Exec, dtype: DType, axis: usize, shape: &[usize], x: &[f64], target: &Target, options: &LossOptions) -> [Vec<f64>; 2] {
    let x = Tensor::floats(dtype, Layout::C, shape, x);
    let mut rows = Tensor::empty(dtype.row_dtype(), Layout::C, &without(shape, &[axis]));
    let mut gradient = Tensor::empty(dtype, Layout::C, shape);
    {
        let out = rows.out();
        let grad = Grad { out: gradient.out(), grad_output: GradOutput::Scalar(1.0) };
        let options = LossOptions { reduction: Reduction::None, ..options.clone() };
        ops::cross_entropy(exec, &x.array(), axis, target, &options, Some(&out), Some(&grad)).unwrap();
    }
    rows.check_guards();
    gradient.check_guards();
    [rows.values(), gradient.values()]
}

/// (rows, classes) as it lies when the classes are axis 0.
fn turned(values: &[f64], classes: usize) -> Vec<f64> {
    let rows = values.len() / classes;
    (0..values.len()).map(|i| values[i % rows * classes + i / rows]).collect()
}

#[test]
fn a_few_classes_are_the_dense_target_they_stand_for() {
    let mut random = Random(8);
    for level in levels() {
        let exec = Exec { level, threads: 2 };
        for dtype in [DType::F32, DType::F16, DType::Bf16, DType::F64] {
            for (classes, rows) in [(2usize, 40usize), (5, 33), (40, 20), (70, 20), (200, 10), (1030, 5), (2500, 3)] {
                let x: Vec<f64> = (0..rows * classes).map(|_| ((random.uniform() - 0.5) * 64.0).round() / 8.0).collect();
                let weight: Vec<f64> = (0..classes).map(|c| 0.5 + (c % 4) as f64 * 0.25).collect();
                let weight = Tensor::floats(DType::F64, Layout::C, &[classes], &weight);
                let class = |random: &mut Random| ((random.uniform() * classes as f64) as usize).min(classes - 1);
                let lam: Vec<f64> = (0..rows).map(|r| [0.25, 0.75, 1.0, 0.0][r % 4]).collect();
                for k in [2usize, 5] {
                    let mut indices: Vec<usize> = (0..rows * k).map(|_| class(&mut random)).collect();
                    // Classes that are named twice count twice.
                    indices[k - 1] = indices[0];
                    let shares: Vec<f64> = if k == 2 {
                        lam.iter().flat_map(|&lam| [lam, 1.0 - lam]).collect()
                    } else {
                        (0..rows * k).map(|i| (i % 3) as f64 / 8.0).collect()
                    };
                    let mut dense = vec![0.0; rows * classes];
                    for (i, (&class, &share)) in indices.iter().zip(&shares).enumerate() {
                        dense[i / k * classes + class] += share;
                    }
                    for (label_smoothing, weighted) in [(0.0, false), (0.1, false), (0.0, true)] {
                        let options = LossOptions { label_smoothing, weight: weighted.then(|| weight.array()), ..LossOptions::default() };
                        for axis in [1, 0] {
                            let shape = if axis == 1 { [rows, classes] } else { [classes, rows] };
                            let lie = |values: &[f64]| if axis == 1 { values.to_vec() } else { turned(values, classes) };
                            let probs = Tensor::floats(DType::F64, Layout::C, &shape, &lie(&dense));
                            let ints = |of: &dyn Fn(usize) -> usize, n: usize| (0..n).map(|i| of(i) as i128).collect::<Vec<_>>();
                            let a = Tensor::ints(DType::I64, Layout::C, &[rows], &ints(&|r| indices[r * k], rows));
                            let b = Tensor::ints(DType::I32, Layout::C, &[rows], &ints(&|r| indices[r * k + 1], rows));
                            let lam = Tensor::floats(DType::F64, Layout::C, &[rows], &lam);
                            let few = Tensor::ints(DType::I64, Layout::C, &[rows, k], &ints(&|i| indices[i], rows * k));
                            let share = Tensor::floats(DType::F64, Layout::C, &[rows, k], &shares);
                            let sparse = Target::Sparse { indices: few.array(), probs: share.array() };
                            let mixup = Target::Mixup { a: a.array(), b: b.array(), lam: lam.array() };
                            let x = lie(&x);
                            let expected = both(&exec, dtype, axis, &shape, &x, &Target::Probs(probs.array()), &options);
                            let targets = if k == 2 { vec![("mixup", mixup), ("sparse", sparse)] } else { vec![("sparse", sparse)] };
                            for (name, target) in targets {
                                let got = both(&exec, dtype, axis, &shape, &x, &target, &options);
                                let context = || {
                                    format!(
                                        "{name} of {k}, {dtype:?}, {classes} classes, axis {axis}, smoothing {label_smoothing}, weighted {weighted}, {level:?}"
                                    )
                                };
                                let (computed, types) = (dtype.row_dtype(), [dtype.row_dtype(), dtype]);
                                for (which, (got, expected)) in got.iter().zip(&expected).enumerate() {
                                    for (i, (&got, &want)) in got.iter().zip(expected).enumerate() {
                                        // Two results, each of which may be off; gradients are differences of numbers up to 2.
                                        let size = if which == 0 { 0.0 } else { 1.0 };
                                        let units = if types[which] == computed { 16.0 } else { 4.0 };
                                        if types[which] == computed {
                                            close(computed, units, got, want, size, &|| format!("{which} at {i}: {}", context()));
                                        } else {
                                            let ulp = super::ulp(dtype, want.abs().max(1e-3));
                                            assert!((got - want).abs() <= ulp, "gradient at {i}: {got}, {want}: {}", context());
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
}

#[test]
fn softcap_of_long_rows() {
    let mut random = Random(9);
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        for classes in [1500usize, 70_000] {
            let (rows, cap) = (2, 5.0);
            let x: Vec<f64> = (0..rows * classes).map(|_| ((random.uniform() - 0.3) * 160.0).round() / 8.0).collect();
            let labels = [7, classes as i128 - 3];
            let options = LossOptions { softcap: Some(cap), ..LossOptions::default() };
            let (losses, gradient) = simple(&exec, DType::F32, &[rows, classes], 1, &x, &labels, &options);
            for (r, &label) in labels.iter().enumerate() {
                let capped: Vec<f64> = x[r * classes..][..classes].iter().map(|x| cap * (x / cap).tanh()).collect();
                let row = Row::new(&capped);
                let close_to = |got: f64, want: f64| (got - want).abs() <= 3e-6 * want.abs() + 1e-12;
                assert!(close_to(losses[r], -row.log_p(label as usize)), "loss {r}, {classes} classes, {level:?}");
                for (c, &y) in capped.iter().enumerate() {
                    let (own, slope) = (f64::from(c as i128 == label), 1.0 - (y / cap).powi(2));
                    let want = (row.p(c) - own) * slope;
                    let got = gradient[r * classes + c];
                    assert!(close_to(got, want), "gradient {r}, {c}: {got:e} for {want:e}, {classes} classes, {level:?}");
                }
            }
        }
    }
}

/// Where x·log2 e leaves the grid of whole numbers, block by block further, in some lanes and not in others.
#[test]
fn maxima_that_grow_beyond_the_grid() {
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        for (classes, rows) in [(200usize, 37usize), (20, 37), (3000, 9), (5000, 5)] {
            let value = |r: usize, c: usize| {
                let base = [0.0, 2.0e5, 3.0e5, -4.0e5, 1.0e5][r % 5];
                let step = [0.0, 1.0e5, 2.0, 0.0][r % 4] * (c * 4 / classes) as f64;
                base + step + ((c * 7 + r) % 5) as f64
            };
            let x: Vec<f64> = (0..rows * classes).map(|i| value(i / classes, i % classes)).collect();
            let labels: Vec<i128> = (0..rows).map(|r| (r * 31 % classes) as i128).collect();
            for axis in [1, 0] {
                let (shape, lying) = if axis == 1 { ([rows, classes], x.clone()) } else { ([classes, rows], turned(&x, classes)) };
                let (losses, gradient) = simple(&exec, DType::F32, &shape, axis, &lying, &labels, &LossOptions::default());
                for (r, row) in x.chunks_exact(classes).enumerate() {
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
fn shapes_types_and_shares_that_do_not_fit_are_refused() {
    let exec = Exec { level: levels()[0], threads: 1 };
    let shape = [3, 5];
    let x = Tensor::floats(DType::F32, Layout::C, &shape, &[0.5; 15]);
    let y = Tensor::ints(DType::I64, Layout::C, &[3], &[1; 3]);
    let refused = |result: Result<(), Error>, what: &str| assert!(matches!(result, Err(Error::Invalid(_))), "{what}: {result:?}");
    for mask_shape in [[5, 3], [3, 4], [1, 5]] {
        let mask = Tensor::ints(DType::Bool, Layout::C, &mask_shape, &vec![1; mask_shape[0] * mask_shape[1]]);
        let options = LossOptions { mask: Some(mask.array()), ..LossOptions::default() };
        refused(ops::cross_entropy(&exec, &x.array(), 1, &Target::Index(y.array()), &options, None, None).map(drop), "mask");
    }
    for (dtype, of) in [(DType::F32, [5, 3]), (DType::F64, shape), (DType::F16, shape)] {
        let mut out = Tensor::empty(dtype, Layout::C, &of);
        let grad = Grad { out: out.out(), grad_output: GradOutput::Scalar(1.0) };
        let result = ops::kl_divergence(&exec, &x.array(), &x.array(), 1, 1.0, Reduction::Mean, None, Some(&grad));
        refused(result.map(drop), "gradient of a divergence");
    }
    for (values, indices) in [(DType::F64, DType::I64), (DType::F32, DType::I32), (DType::F32, DType::F64)] {
        let (mut values, mut indices) = (Tensor::empty(values, Layout::C, &[3, 2]), Tensor::empty(indices, Layout::C, &[3, 2]));
        refused(ops::topk_logprobs(&exec, &x.array(), 1, &values.out(), &indices.out()), "types of the largest");
    }
    for lam in [-0.1, 1.5, f64::NAN] {
        let share = Tensor::floats(DType::F64, Layout::C, &[3], &[0.5, lam, 0.5]);
        let target = Target::Mixup { a: y.array(), b: y.array(), lam: share.array() };
        let result = ops::cross_entropy(&exec, &x.array(), 1, &target, &LossOptions::default(), None, None);
        assert!(matches!(result, Err(Error::BadValue { argument: "lam", position: 1, .. })), "{lam}: {result:?}");
    }
}
