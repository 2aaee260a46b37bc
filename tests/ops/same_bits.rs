//! The same bits for any number of threads and whatever the neighbours of a row.

use crossent::array::{Array, DType};
use crossent::ops::{self, Exec, Grad, GradOutput, LossOptions, Reduction, Target};

use super::case::Choice;
use super::losses::simple;
use super::tensor::{FLOATS, Layout, READABLE, Tensor, WRITABLE};
use super::{Random, levels, skipped, without};

#[test]
fn the_same_bits_for_every_number_of_threads() {
    // Large enough to be shared out: many short rows, few long ones, one huge one, a strided class axis.
    let shapes: [(&[usize], usize); 6] =
        [(&[30011, 10], 1), (&[40009, 2], 1), (&[257, 513], 1), (&[1, 262_147], 1), (&[2, 21, 40, 50], 1), (&[1000, 131], 0)];
    for level in levels() {
        let mut seed = 100_usize;
        for dtype in FLOATS {
            for (shape, axis) in shapes {
                for target in [DType::I32, DType::F32] {
                    if skipped(&mut seed) {
                        continue;
                    }
                    let choice = Choice {
                        dtype,
                        layout: if seed.is_multiple_of(3) { Layout::Fortran } else { Layout::C },
                        out_layout: Layout::C,
                        shape: shape.to_vec(),
                        axis,
                        target,
                        weight: seed.is_multiple_of(2).then_some(DType::F32),
                        smoothing: if target == DType::F32 { 0.1 } else { 0.0 },
                        ignored: 7,
                        reduction: Reduction::Mean,
                        grad_rows: false,
                        seed: seed as u64,
                    };
                    let case = choice.build();
                    let run = |threads: usize| {
                        let exec = Exec { level, threads };
                        let (mean, _, gradient) = case.run(&exec, Reduction::Mean, true, false);
                        let (placed, _, in_place) = case.run(&exec, Reduction::Mean, true, true);
                        let (sum, _, _) = case.run(&exec, Reduction::Sum, false, false);
                        let (_, rows, _) = case.run(&exec, Reduction::None, false, false);
                        let mut lp = Tensor::empty(dtype, Layout::C, shape);
                        ops::log_softmax(&exec, &case.x.array(), &[axis], &lp.out()).unwrap();
                        let mut lse = Tensor::empty(dtype.row_dtype(), Layout::C, &without(shape, &[axis]));
                        ops::logsumexp(&exec, &case.x.array(), &[axis], &lse.out()).unwrap();
                        let scalars = [mean.to_bits(), placed.to_bits(), sum.to_bits()];
                        (scalars, [rows.bits(), gradient.bits(), in_place.bits(), lp.bits(), lse.bits()])
                    };
                    let one = run(1);
                    for threads in [2, 3] {
                        let many = run(threads);
                        assert_eq!(one.0, many.0, "reductions with {threads} threads: {choice:?} {level:?}");
                        for (name, (a, b)) in
                            ["rows", "gradient", "gradient in place", "log_softmax", "logsumexp"].iter().zip(one.1.iter().zip(&many.1))
                        {
                            assert!(a == b, "{name} differ with {threads} threads: {choice:?} {level:?}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        for dtype in FLOATS {
            for classes in [1usize, 2, 3, 10, 16, 17, 33, 64, 65, 100, 255, 256, 513, 1000] {
                let mut random = Random(classes as u64);
                let n = 37;
                let rows: Vec<Vec<f64>> = (0..n).map(|_| random.row(dtype, classes)).collect();
                let labels: Vec<i128> = (0..n).map(|_| random.below(classes) as i128).collect();
                let options = LossOptions::default();
                let (losses, gradients) = simple(&exec, dtype, &[n, classes], 1, &rows.concat(), &labels, &options);
                let same = |a: f64, b: f64| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                // Alone, and among strangers in the opposite order.
                let reversed: Vec<f64> = rows.iter().rev().flatten().copied().collect();
                let back: Vec<i128> = labels.iter().rev().copied().collect();
                let (losses_back, gradients_back) = simple(&exec, dtype, &[n, classes], 1, &reversed, &back, &options);
                for r in 0..n {
                    let (alone, gradient) = simple(&exec, dtype, &[1, classes], 1, &rows[r], &labels[r..=r], &options);
                    let context = format!("row {r} of {n} x {classes} {dtype:?} {level:?}");
                    assert!(same(alone[0], losses[r]), "alone {:e}, in company {:e}: {context}", alone[0], losses[r]);
                    assert!(same(losses_back[n - 1 - r], losses[r]), "the order of the rows matters: {context}");
                    for c in 0..classes {
                        let expected = gradients[r * classes + c];
                        assert!(same(gradient[c], expected), "gradient {c} alone {:e}, in company {expected:e}: {context}", gradient[c]);
                        assert!(same(gradients_back[(n - 1 - r) * classes + c], expected), "gradient {c}, order of the rows: {context}");
                    }
                }
            }
        }
    }
}

/// The bits of a row are those of its logits, the number of classes and the layout of the class axis alone.
#[test]
fn a_row_alone_is_the_row_of_the_batch() {
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        let mut count = 0;
        for dtype in FLOATS {
            for classes in [1usize, 2, 3, 5, 16, 64, 65, 200, 600] {
                for n in [3usize, 37, 150] {
                    for layout in READABLE {
                        if skipped(&mut count) {
                            continue;
                        }
                        let mut random = Random((classes * n) as u64);
                        let shape = [n, classes];
                        let values: Vec<f64> = (0..n).flat_map(|_| random.row(dtype, classes)).collect();
                        let x = Tensor::floats(dtype, layout, &shape, &values);
                        let labels: Vec<i128> = (0..n).map(|r| if r % 5 == 2 { -100 } else { random.below(classes) as i128 }).collect();
                        let y = Tensor::ints(DType::I64, Layout::C, &[n], &labels);
                        let out_layout = WRITABLE[random.below(WRITABLE.len())];
                        let run = |x: &Array, y: &Array, n: usize, smoothing: f64| {
                            let shape = [n, classes];
                            let mut rows = Tensor::empty(dtype.row_dtype(), Layout::C, &[n]);
                            let [mut gradient, mut p, mut lp] = [0; 3].map(|_| Tensor::empty(dtype, out_layout, &shape));
                            let options = LossOptions { label_smoothing: smoothing, reduction: Reduction::None, ..LossOptions::default() };
                            {
                                let out = rows.out();
                                let grad = Grad { out: gradient.out(), grad_output: GradOutput::Scalar(0.7) };
                                ops::cross_entropy(&exec, x, 1, &Target::Index(y.clone()), &options, Some(&out), Some(&grad)).unwrap();
                            }
                            ops::softmax(&exec, x, &[1], &p.out()).unwrap();
                            ops::log_softmax(&exec, x, &[1], &lp.out()).unwrap();
                            [rows.values(), gradient.values(), p.values(), lp.values()]
                        };
                        let smoothing = [0.0, 0.1][random.below(2)];
                        let batch = run(&x.array(), &y.array(), n, smoothing);
                        for r in [0, 1, n / 2, n - 1] {
                            let alone = run(&x.part(r, 1), &y.part(r, 1), 1, smoothing);
                            for (name, (alone, batch)) in
                                ["loss", "gradient", "softmax", "log_softmax"].iter().zip(alone.iter().zip(&batch))
                            {
                                let width = alone.len();
                                for (c, (a, b)) in alone.iter().zip(&batch[r * width..]).enumerate() {
                                    let same = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                                    assert!(
                                        same,
                                        "{name} {c} of row {r}: alone {a:e}, in company {b:e}: {dtype:?} {layout:?} {shape:?} {level:?}"
                                    );
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
fn a_row_of_several_segments_is_the_same_however_it_is_shared() {
    let classes = 131_072 + 70_000;
    for level in levels() {
        for dtype in [DType::F32, DType::F64] {
            let mut random = Random(7);
            let plain: Vec<f64> = (0..classes).map(|_| (random.uniform() * 64.0).round() / 8.0 - 40.0).collect();
            // Where the maximum is, and what else there is: a tie in another segment, a segment of -inf, what makes the row NaN.
            let changes: [(&str, &[(usize, f64)]); 7] = [
                ("first", &[(3, 9.0)]),
                ("last", &[(classes - 1, 9.0)]),
                ("tie", &[(70_000, 9.0), (140_000, 9.0)]),
                ("far apart", &[(5, 9.0), (66_000, 0.0), (135_000, -3.0)]),
                ("nan", &[(3, 9.0), (140_000, f64::NAN)]),
                ("inf", &[(70_000, f64::INFINITY)]),
                ("empty", &[(140_000, 9.0)]),
            ];
            let rows: Vec<Vec<f64>> = changes
                .iter()
                .map(|(name, changes)| {
                    let mut row = plain.clone();
                    changes.iter().for_each(|&(class, x)| row[class] = x);
                    if *name == "empty" {
                        row[..131_072].fill(f64::NEG_INFINITY);
                    }
                    row
                })
                .collect();
            let labels = [3, 3, 140_000, 135_000, 3, 70_000, 140_001];
            let options = LossOptions::default();
            let run = |threads: usize, rows: &[Vec<f64>], labels: &[i128]| {
                simple(&Exec { level, threads }, dtype, &[rows.len(), classes], 1, &rows.concat(), labels, &options)
            };
            let (losses, gradients) = run(1, &rows, &labels);
            for (i, (name, _)) in changes.iter().enumerate() {
                for threads in [1, 2, 5] {
                    let (loss, gradient) = run(threads, &rows[i..=i], &labels[i..=i]);
                    assert!(same(&loss, &losses[i..=i]), "loss of {name} with {threads} threads at {level:?}");
                    let batch = &gradients[i * classes..(i + 1) * classes];
                    assert!(same(&gradient, batch), "gradient of {name} with {threads} threads at {level:?}");
                }
                let row = &rows[i];
                let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let want = max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln() - row[labels[i] as usize];
                let bad = *name == "nan" || *name == "inf";
                assert!(
                    if bad { losses[i].is_nan() } else { (losses[i] - want).abs() <= 1e-5 * (1.0 + want.abs()) },
                    "{name} at {level:?}: {} beside {want}",
                    losses[i]
                );
            }
        }
    }
}

/// The rows of an array side by side: class by class.
fn side_by_side(rows: &[&[f64]]) -> Vec<f64> {
    (0..rows[0].len()).flat_map(|c| rows.iter().map(move |row| row[c])).collect()
}

fn same(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

#[test]
fn columns_of_several_parts_are_the_same_however_they_are_shared() {
    let classes = 2 * 8192 + 5000;
    for level in levels() {
        for dtype in [DType::F32, DType::F64] {
            let mut random = Random(8);
            let plain: Vec<f64> = (0..classes).map(|_| (random.uniform() * 64.0).round() / 8.0 - 40.0).collect();
            // Where the maximum is, and what else there is; a maximum that outgrows what came before again and again, on the grid and off it.
            let changes: [(&str, &[(usize, f64)]); 10] = [
                ("first", &[(3, 9.0)]),
                ("last", &[(classes - 1, 9.0)]),
                ("tie", &[(7000, 9.0), (17_000, 9.0)]),
                ("far apart", &[(5, 9.0), (9000, 0.0), (20_000, -3.0)]),
                ("nan", &[(3, 9.0), (17_000, f64::NAN)]),
                ("inf", &[(9000, f64::INFINITY), (9001, f64::INFINITY)]),
                ("inf twice", &[(9000, f64::INFINITY), (17_001, f64::INFINITY)]),
                ("empty", &[(17_000, 9.0)]),
                ("rising", &[(100, 20.0), (200, 90.0), (8200, 200.0), (8300, 270.0), (17_000, 269.5)]),
                ("off the grid", &[(100, 3e5), (200, 3e5 + 100.0), (8200, 6e5), (17_000, 6e5 - 0.5)]),
            ];
            let rows: Vec<Vec<f64>> = changes
                .iter()
                .map(|(name, changes)| {
                    let mut row = plain.clone();
                    changes.iter().for_each(|&(class, x)| row[class] = x);
                    if *name == "empty" {
                        row[..16_384].fill(f64::NEG_INFINITY);
                    }
                    row
                })
                .collect();
            let labels = [3, 3, 17_000, 20_000, 3, 9000, 9000, 17_001, 17_000, 17_000];
            let options = LossOptions::default();
            let run = |threads: usize, rows: &[&[f64]], labels: &[i128]| {
                simple(&Exec { level, threads }, dtype, &[classes, rows.len()], 0, &side_by_side(rows), labels, &options)
            };
            let all: Vec<&[f64]> = rows.iter().map(Vec::as_slice).collect();
            let (losses, gradients) = run(1, &all, &labels);
            for (i, (name, _)) in changes.iter().enumerate() {
                // Beside another: alone it would be a run of memory.
                for threads in [1, 2, 5] {
                    let (loss, gradient) = run(threads, &[&rows[i], &plain], &[labels[i], 0]);
                    assert!(same(&loss[..1], &losses[i..=i]), "loss of {name} with {threads} threads at {level:?}");
                    let alone: Vec<f64> = gradient.iter().copied().step_by(2).collect();
                    let batch: Vec<f64> = gradients.iter().copied().skip(i).step_by(rows.len()).collect();
                    assert!(same(&alone, &batch), "gradient of {name} with {threads} threads at {level:?}");
                }
                let row = &rows[i];
                let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let want = max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln() - row[labels[i] as usize];
                let bad = name.starts_with("nan") || name.starts_with("inf");
                assert!(
                    if bad { losses[i].is_nan() } else { (losses[i] - want).abs() <= 1e-6 * (1.0 + want.abs()) },
                    "{name} at {level:?}: {} beside {want}",
                    losses[i]
                );
            }
        }
    }
}

#[test]
fn long_runs_of_columns_are_what_short_ones_are() {
    let (classes, n) = (83, 2100);
    for level in levels() {
        for dtype in FLOATS {
            let mut random = Random(9);
            let rows: Vec<Vec<f64>> =
                (0..n).map(|_| (0..classes).map(|_| (random.uniform() * 256.0).round() / 8.0 - 20.0).collect()).collect();
            let labels: Vec<i128> = (0..n).map(|r| (r * 7 % classes) as i128).collect();
            // Some rows count nothing, in every other run.
            let options = LossOptions { ignore_index: Some(77), ..LossOptions::default() };
            let run = |threads: usize, from: usize, to: usize| {
                let rows: Vec<&[f64]> = rows[from..to].iter().map(Vec::as_slice).collect();
                simple(&Exec { level, threads }, dtype, &[classes, to - from], 0, &side_by_side(&rows), &labels[from..to], &options)
            };
            let (losses, gradients) = run(1, 0, n);
            let (shared_losses, shared_gradients) = run(3, 0, n);
            assert!(same(&losses, &shared_losses) && same(&gradients, &shared_gradients), "threads, {dtype:?} at {level:?}");
            let mut from = 0;
            while from < n {
                let to = n.min(from + 2 + from % 61);
                let (loss, gradient) = run(1, from, to);
                assert!(same(&loss, &losses[from..to]), "losses from {from}, {dtype:?} at {level:?}");
                for c in 0..classes {
                    let (a, b) = (&gradient[c * (to - from)..][..to - from], &gradients[c * n + from..][..to - from]);
                    assert!(same(a, b), "gradients of class {c} from {from}, {dtype:?} at {level:?}");
                }
                from = to;
            }
        }
    }
}

#[test]
fn rows_that_lie_backwards_are_what_copies_of_them_are() {
    for level in levels() {
        for dtype in FLOATS {
            let mut seed = 0;
            for classes in [40, 255, 256, 257, 300, 511, 513, 768, 1000, 1008, 1024, 1025, 3001, 7198] {
                if skipped(&mut seed) {
                    continue;
                }
                let n = 45;
                let mut random = Random(classes as u64);
                let x: Vec<f64> = (0..n * classes)
                    .map(|i| {
                        let (r, c, x) = (i / classes, i % classes, (random.uniform() * 256.0).round() / 16.0 - 8.0);
                        // Rows of every kind: equal classes, nothing, an infinite one, one off the grid or confident, NaN.
                        match r {
                            3 => 1.5,
                            4 => f64::NEG_INFINITY,
                            5 if c == 7 => f64::INFINITY,
                            6 if c == classes - 2 => 60000.0,
                            7 => x * 4000.0,
                            8 if c == 1 => 90.0,
                            9 if c >= 20 && c % 17 == 3 => f64::NEG_INFINITY,
                            10 if c == classes - 1 => f64::NAN,
                            11 if c % 50 == 0 => 9.0,
                            12 if dtype != DType::F16 => x + 2e5,
                            _ => x,
                        }
                    })
                    .collect();
                let labels: Vec<i128> = (0..n).map(|r| (r * 31 % classes) as i128).collect();
                let target = Tensor::ints(DType::I64, Layout::C, &[n], &labels);
                let run = |layout: Layout, out: Layout, threads: usize| {
                    let (x, exec) = (Tensor::floats(dtype, layout, &[n, classes], &x), Exec { level, threads });
                    let options = LossOptions { reduction: Reduction::None, ..LossOptions::default() };
                    let [mut alone, mut rows, mut lse] = [0; 3].map(|_| Tensor::empty(dtype.row_dtype(), Layout::C, &[n]));
                    let [mut gradient, mut p, mut lp] = [0; 3].map(|_| Tensor::empty(dtype, out, &[n, classes]));
                    let target = || Target::Index(target.array());
                    {
                        let grad = Grad { out: gradient.out(), grad_output: GradOutput::Scalar(1.0) };
                        ops::cross_entropy(&exec, &x.array(), 1, &target(), &options, Some(&rows.out()), Some(&grad)).unwrap();
                    }
                    ops::cross_entropy(&exec, &x.array(), 1, &target(), &options, Some(&alone.out()), None).unwrap();
                    ops::logsumexp(&exec, &x.array(), &[1], &lse.out()).unwrap();
                    ops::softmax(&exec, &x.array(), &[1], &p.out()).unwrap();
                    ops::log_softmax(&exec, &x.array(), &[1], &lp.out()).unwrap();
                    [alone, rows, lse, gradient, p, lp].map(|tensor| tensor.values())
                };
                let want = run(Layout::C, Layout::C, 1);
                for (out, threads) in [(Layout::C, 1), (Layout::C, 3), (Layout::Reversed, 1)] {
                    let got = run(Layout::Reversed, out, threads);
                    for (name, (got, want)) in
                        ["loss", "loss with gradient", "logsumexp", "gradient", "softmax", "log_softmax"].iter().zip(got.iter().zip(&want))
                    {
                        assert!(same(got, want), "{name}, {classes} classes, {threads} threads, out {out:?}, {dtype:?} at {level:?}");
                    }
                }
            }
        }
    }
}
