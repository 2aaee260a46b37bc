//! log-softmax, softmax, logsumexp and the gradients through them.

use crossent::array::DType;
use crossent::ops::{self, Exec, Grad, GradOutput, LossOptions, Reduction, Target};

use super::oracle::{self, Row};
use super::tensor::{FLOATS, Layout, READABLE, Tensor, WRITABLE};
use super::{Random, close, lengths, levels, random_logits, rows_of, skipped, thin, without};

pub fn check_transforms(exec: &Exec, x: &Tensor, axes: &[usize], out_layout: Layout, context: &dyn Fn() -> String) {
    let before = x.memory().to_vec();
    let values = x.values();
    let groups = rows_of(&x.shape, axes);
    let fibers: Vec<Vec<f64>> = groups.iter().map(|row| row.iter().map(|&at| values[at]).collect()).collect();
    let rows: Vec<Row> = fibers.iter().map(|fiber| Row::new(fiber)).collect();

    let mut lse = Tensor::empty(x.dtype.row_dtype(), out_layout, &without(&x.shape, axes));
    ops::logsumexp(exec, &x.array(), axes, &lse.out()).unwrap();
    for (r, (&actual, row)) in lse.values().iter().zip(&rows).enumerate() {
        close(lse.dtype, 4.0, actual, row.logsumexp(), row.max, &|| format!("logsumexp row {r} of {}", context()));
    }
    lse.check_guards();

    let check = |name: &str, units: f64, actual: &Tensor, exact: &dyn Fn(&Row, usize) -> f64| {
        let actual = actual.values();
        for (r, (group, row)) in groups.iter().zip(&rows).enumerate() {
            for (c, &at) in group.iter().enumerate() {
                close(x.dtype, units, actual[at], exact(row, c), 0.0, &|| format!("{name} row {r} class {c} of {}", context()));
            }
        }
    };
    let mut out = Tensor::empty(x.dtype, out_layout, &x.shape);
    ops::softmax(exec, &x.array(), axes, &out.out()).unwrap();
    check("softmax", 8.0, &out, &|row, c| row.p(c));
    ops::log_softmax(exec, &x.array(), axes, &out.out()).unwrap();
    check("log_softmax", 4.0, &out, &|row, c| row.log_p(c));
    out.check_guards();
    assert_eq!(x.memory(), before, "the input of {} was written to", context());

    let mut place = Tensor::floats(x.dtype, out_layout, &x.shape, &values);
    {
        let out = place.out();
        ops::softmax(exec, &out.array().clone(), axes, &out).unwrap();
    }
    check("softmax in place", 8.0, &place, &|row, c| row.p(c));
    let mut place = Tensor::floats(x.dtype, out_layout, &x.shape, &values);
    {
        let out = place.out();
        ops::log_softmax(exec, &out.array().clone(), axes, &out).unwrap();
    }
    check("log_softmax in place", 4.0, &place, &|row, c| row.log_p(c));
    place.check_guards();
}

#[test]
fn transforms_of_every_length_type_and_layout() {
    for level in levels() {
        let mut random = Random(1);
        for dtype in FLOATS {
            for classes in lengths() {
                for (i, layout) in READABLE.into_iter().enumerate() {
                    // Long rows in a layout each, short ones in all.
                    if (classes > 70 || thin()) && (i + classes) % 4 != 0 {
                        continue;
                    }
                    let (shape, axis) = if random.below(2) == 0 { ([5, classes], 1) } else { ([classes, 5], 0) };
                    let out_layout = WRITABLE[random.below(WRITABLE.len())];
                    let exec = Exec { level, threads: 1 + random.below(3) };
                    let x = random_logits(&mut random, dtype, layout, &shape, &[axis]);
                    let context = || format!("{dtype:?} {layout:?} {shape:?} axis {axis} into {out_layout:?} with {exec:?}");
                    check_transforms(&exec, &x, &[axis], out_layout, &context);
                }
            }
        }
    }
}

#[test]
fn transforms_over_any_axes() {
    for level in levels() {
        let mut random = Random(2);
        for dtype in FLOATS {
            for (shape, axes) in [
                (&[7, 3, 5][..], &[0][..]),
                (&[7, 3, 5], &[1]),
                (&[7, 3, 5], &[0, 1]),
                (&[7, 3, 5], &[0, 2]),
                (&[7, 3, 5], &[1, 2]),
                (&[7, 3, 5], &[0, 1, 2]),
                (&[2, 3, 4, 5], &[1]),
                (&[2, 3, 4, 5], &[0, 3]),
                (&[2, 21, 9, 11], &[1]),
                (&[33], &[0]),
                (&[40, 1], &[1]),
                (&[1, 40], &[0]),
                (&[1, 1, 600], &[2]),
                (&[600, 33], &[0]),
            ] {
                for layout in READABLE {
                    let x = random_logits(&mut random, dtype, layout, shape, axes);
                    let out_layout = WRITABLE[random.below(WRITABLE.len())];
                    let exec = Exec { level, threads: 1 + random.below(3) };
                    let context = || format!("{dtype:?} {layout:?} {shape:?} axes {axes:?} into {out_layout:?} with {exec:?}");
                    check_transforms(&exec, &x, axes, out_layout, &context);
                }
            }
        }
    }
}

/// Classes so far below the maximum that one of them is lost, but not all of them together, whichever comes first.
#[test]
fn transforms_of_rows_whose_rest_is_tiny() {
    for level in levels() {
        let mut count = 0;
        for dtype in [DType::F32, DType::F64, DType::Bf16] {
            let depth = if dtype == DType::F64 { 708.0 } else { 86.0 };
            for classes in [40, 100, 300, 1000] {
                for at in [0, classes / 2, classes - 1] {
                    let rows: Vec<f64> = (0..16).map(|i| depth + f64::from(i) * 0.25).collect();
                    let n = rows.len();
                    for (shape, axis) in [([n, classes], 1), ([classes, n], 0)] {
                        if skipped(&mut count) {
                            continue;
                        }
                        let mut values = vec![0.0; n * classes];
                        for (group, x) in rows_of(&shape, &[axis]).iter().zip(&rows) {
                            values[group[at]] = *x;
                        }
                        let x = Tensor::floats(dtype, Layout::C, &shape, &values);
                        let context = || format!("tiny rest, {dtype:?} {shape:?} axis {axis} maximum at {at} {level:?}");
                        check_transforms(&Exec { level, threads: 1 }, &x, &[axis], Layout::C, &context);
                    }
                }
            }
        }
    }
}

/// Blocks of classes whose largest probability is near the smallest normal number, read before the maximum of the row is known.
#[test]
fn transforms_of_rows_that_begin_far_below_their_maximum() {
    for level in levels() {
        for (dtype, depths) in
            [(DType::F32, [40.0, 60.0, 84.5, 86.9]), (DType::Bf16, [40.0, 60.0, 84.5, 86.0]), (DType::F64, [300.0, 500.0, 705.0, 707.9])]
        {
            for classes in [2047, 3000] {
                let values: Vec<f64> = depths
                    .iter()
                    .flat_map(|depth| {
                        (0..classes).map(move |c| if c == classes - 7 { 0.0 } else { -depth - f64::from(c as u32 % 8) * 0.0625 })
                    })
                    .collect();
                for out in [Layout::C, Layout::Rolled] {
                    let x = Tensor::floats(dtype, Layout::C, &[depths.len(), classes], &values);
                    let context = || format!("{dtype:?} far below, {classes} classes, {level:?}, into {out:?}");
                    check_transforms(&Exec { level, threads: 1 }, &x, &[1], out, &context);
                }
            }
        }
    }
}

#[test]
fn transforms_of_special_rows() {
    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;
    for level in levels() {
        for dtype in FLOATS {
            for classes in [1, 2, 3, 5, 16, 17, 64, 65, 512, 600] {
                let tiny = if dtype == DType::F16 { 6e-8 } else { 1e-38 };
                let largest = if dtype == DType::F16 { 65504.0 } else { 3.3e38 };
                let mut rows = Vec::new();
                for (fill, odd) in [
                    (0.0, NAN),
                    (-INF, NAN),
                    (INF, NAN),
                    (0.0, INF),
                    (-INF, INF),
                    (INF, INF),
                    (-INF, -INF),
                    (-INF, 3.0),
                    (1.0, -INF),
                    (0.0, 0.0),
                    (-0.0, 0.0),
                    (tiny, -tiny),
                    (largest, -largest),
                    (-largest, -largest),
                    (largest, largest),
                    (0.0, largest),
                    (INF, -INF),
                ] {
                    for at in [0, classes / 2, classes - 1] {
                        let mut row = vec![fill; classes];
                        row[at] = odd;
                        rows.push(row);
                    }
                }
                let n = rows.len();
                for (shape, axis) in [([n, classes], 1), ([classes, n], 0)] {
                    let mut values = vec![0.0; n * classes];
                    for (group, row) in rows_of(&shape, &[axis]).iter().zip(&rows) {
                        group.iter().zip(row).for_each(|(&at, &x)| values[at] = x);
                    }
                    let x = Tensor::floats(dtype, Layout::C, &shape, &values);
                    let context = || format!("special rows, {dtype:?} {shape:?} axis {axis} {level:?}");
                    check_transforms(&Exec { level, threads: 2 }, &x, &[axis], Layout::C, &context);
                }
            }
        }
    }
}

#[test]
fn empty_arrays() {
    for level in levels() {
        let exec = Exec { level, threads: 2 };
        for dtype in FLOATS {
            let x = Tensor::floats(dtype, Layout::C, &[3, 0], &[]);
            let mut lse = Tensor::empty(dtype.row_dtype(), Layout::C, &[3]);
            ops::logsumexp(&exec, &x.array(), &[1], &lse.out()).unwrap();
            assert_eq!(lse.values(), [f64::NEG_INFINITY; 3]);
            let mut out = Tensor::empty(dtype, Layout::C, &[3, 0]);
            ops::softmax(&exec, &x.array(), &[1], &out.out()).unwrap();
            ops::log_softmax(&exec, &x.array(), &[1], &out.out()).unwrap();

            let x = Tensor::floats(dtype, Layout::C, &[0, 3], &[]);
            let mut none = Tensor::empty(dtype.row_dtype(), Layout::C, &[0]);
            ops::logsumexp(&exec, &x.array(), &[1], &none.out()).unwrap();
            let mut out = Tensor::empty(dtype, Layout::C, &[0, 3]);
            ops::softmax(&exec, &x.array(), &[1], &out.out()).unwrap();
            let target = Tensor::ints(DType::I64, Layout::C, &[0], &[]);
            for (reduction, expected) in [(Reduction::Mean, f64::NAN), (Reduction::Sum, 0.0), (Reduction::None, 0.0)] {
                let options = LossOptions { reduction, ..LossOptions::default() };
                let rows = none.out();
                let grad = Grad { out: out.out(), grad_output: GradOutput::Scalar(1.0) };
                let loss =
                    ops::cross_entropy(&exec, &x.array(), 1, &Target::Index(target.array()), &options, Some(&rows), Some(&grad)).unwrap();
                assert!(loss == expected || loss.is_nan() && expected.is_nan(), "{reduction:?}: {loss}");
            }
            none.check_guards();
            out.check_guards();
            lse.check_guards();
        }
    }
}

#[test]
fn vjps() {
    for level in levels() {
        let mut random = Random(3);
        for dtype in FLOATS {
            for classes in lengths() {
                let (shape, axis) = if random.below(2) == 0 { ([4, classes], 1) } else { ([classes, 4], 0) };
                let exec = Exec { level, threads: 1 + random.below(3) };
                let size = 4 * classes;
                let groups = rows_of(&shape, &[axis]);
                let logits: Vec<f64> = (0..size).map(|_| random.normal() * 3.0).collect();
                let upstream: Vec<f64> = (0..size).map(|_| random.normal()).collect();
                let g_type = FLOATS[random.below(4)];
                let g = Tensor::floats(g_type, READABLE[random.below(READABLE.len())], &shape, &upstream);
                let mut forward = vec![[0.0; 2]; size];
                for group in &groups {
                    let fiber: Vec<f64> = group.iter().map(|&at| logits[at]).collect();
                    let row = Row::new(&fiber);
                    for (c, &at) in group.iter().enumerate() {
                        forward[at] = [row.p(c), row.log_p(c)];
                    }
                }
                for (which, name) in ["softmax_vjp", "log_softmax_vjp"].into_iter().enumerate() {
                    let given: Vec<f64> = forward.iter().map(|pair| pair[which]).collect();
                    let given = Tensor::floats(dtype, READABLE[random.below(READABLE.len())], &shape, &given);
                    let out_layout = WRITABLE[random.below(WRITABLE.len())];
                    let mut out = Tensor::empty(dtype, out_layout, &shape);
                    let vjp = if which == 0 { ops::softmax_vjp } else { ops::log_softmax_vjp };
                    vjp(&exec, &g.array(), &given.array(), axis, &out.out()).unwrap();
                    out.check_guards();
                    // What the arrays hold, rounded as they are, is what the result is judged by.
                    let (g, y, actual) = (g.values(), given.values(), out.values());
                    for group in &groups {
                        let gp = |at: usize| if which == 0 { g[at] * y[at] } else { g[at] };
                        let total = oracle::sum(group.iter().map(|&at| gp(at)));
                        let sizes = oracle::sum(group.iter().map(|&at| gp(at).abs()));
                        for &at in group {
                            let (expected, size) = if which == 0 {
                                (y[at] * (g[at] - total), y[at] * (g[at].abs() + sizes))
                            } else {
                                (g[at] - y[at].exp() * total, g[at].abs() + y[at].exp() * sizes)
                            };
                            close(dtype, 8.0, actual[at], expected, size, &|| {
                                format!("{name} at {at}: {dtype:?} (g {g_type:?}) {shape:?} axis {axis} into {out_layout:?} with {exec:?}")
                            });
                        }
                    }
                }
            }
        }
    }
}
