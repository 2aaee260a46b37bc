//! What is refused, before anything is written.

use crossent::array::DType;
use crossent::ops::{self, Error, Exec, Grad, GradOutput, LossOptions, Reduction, Target};

use super::losses::simple;
use super::tensor::{Layout, Tensor};
use super::{levels, without};

#[test]
fn the_sides_of_many_mixed_rows_are_read_by_all_threads() {
    let n = 20_000;
    let x = Tensor::floats(DType::F32, Layout::C, &[n, 10], &vec![0.5; n * 10]);
    let lam = Tensor::floats(DType::F64, Layout::C, &[n], &vec![0.25; n]);
    let good: Vec<i128> = (0..n).map(|r| r as i128 % 10).collect();
    for level in levels() {
        for (argument, position) in [("y_a", 19_999), ("y_b", 8_191), ("y_b", 8_192)] {
            let mut bad = good.clone();
            (bad[position], bad[n - 1]) = (10, 10);
            let (good, bad) = (Tensor::ints(DType::I64, Layout::C, &[n], &good), Tensor::ints(DType::I64, Layout::C, &[n], &bad));
            let (a, b) = if argument == "y_a" { (&bad, &good) } else { (&good, &bad) };
            let target = Target::Mixup { a: a.array(), b: b.array(), lam: lam.array() };
            for threads in [1, 3] {
                let loss = ops::cross_entropy(&Exec { level, threads }, &x.array(), 1, &target, &LossOptions::default(), None, None);
                assert_eq!(loss, Err(Error::TargetOutOfBounds { argument, position, value: 10 }), "{level:?} {threads}");
            }
        }
    }
}

#[test]
fn a_label_out_of_bounds_is_refused_before_anything_is_written() {
    for level in levels() {
        let exec = Exec { level, threads: 3 };
        for (int, bad) in [
            (DType::I8, -1),
            (DType::I16, i128::from(i16::MIN)),
            (DType::I32, 10),
            (DType::I64, i128::from(i64::MIN)),
            (DType::I64, i128::from(i64::MAX)),
            (DType::U8, 255),
            (DType::U16, 10),
            (DType::U32, i128::from(u32::MAX)),
            (DType::U64, i128::from(u64::MAX)),
            // Its low bits would be class 1.
            (DType::U64, (1 << 32) + 1),
            // As a signed number this would be -100, the default mark.
            (DType::U64, i128::from((-100i64).cast_unsigned())),
        ] {
            for (shape, axis) in [(&[20000, 10][..], 1), (&[10, 60], 0), (&[3, 10, 7], 1)] {
                let row_shape = without(shape, &[axis]);
                let n: usize = row_shape.iter().product();
                for position in [0, n / 2, n - 1] {
                    let mut labels: Vec<i128> = (0..n).map(|r| r as i128 % 10).collect();
                    labels[position] = bad;
                    if position == n / 2 {
                        // The first one is named, whoever reads the last.
                        labels[n - 1] = bad;
                    }
                    let y = Tensor::ints(int, Layout::Reversed, &row_shape, &labels);
                    let x = Tensor::floats(DType::F32, Layout::C, shape, &vec![0.5; n * 10]);
                    let mut rows = Tensor::empty(DType::F32, Layout::C, &row_shape);
                    let mut gradient = Tensor::empty(DType::F32, Layout::C, shape);
                    let (rows_before, before) = (rows.memory().to_vec(), gradient.memory().to_vec());
                    let expected = Error::TargetOutOfBounds { argument: "target", position, value: bad };
                    let options = LossOptions { reduction: Reduction::None, ..LossOptions::default() };
                    let (cross_entropy, nll) = {
                        let out = rows.out();
                        let grad = Grad { out: gradient.out(), grad_output: GradOutput::Scalar(1.0) };
                        (
                            ops::cross_entropy(&exec, &x.array(), axis, &Target::Index(y.array()), &options, Some(&out), Some(&grad)),
                            ops::nll_loss(&exec, &x.array(), axis, &y.array(), &options, Some(&out), Some(&grad)),
                        )
                    };
                    assert_eq!(cross_entropy, Err(expected.clone()), "{int:?} {shape:?} {level:?}");
                    assert_eq!(nll, Err(expected), "{int:?} {shape:?} {level:?}");
                    assert!(
                        rows.memory() == rows_before && gradient.memory() == before,
                        "written to before the refusal: {int:?} {shape:?} {level:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn any_label_may_be_the_ignored_one() {
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        let x = [0.0, 1.0, 2.0, 3.0];
        for mark in [-100, -1, 0, 1, 7, i128::from(i64::MIN), i128::from(i64::MAX)] {
            let options = LossOptions { ignore_index: Some(mark as i64), ..LossOptions::default() };
            let (loss, gradient) = simple(&exec, DType::F64, &[2, 2], 1, &x, &[mark, i128::from(mark == 0)], &options);
            assert!(
                loss[0] == 0.0 && gradient[..2] == [0.0; 2] && loss[1] > 0.0 && gradient[2] != 0.0,
                "{mark} {level:?}: {loss:?} {gradient:?}"
            );
        }
    }
}

#[test]
fn an_axis_that_is_not_there_is_refused() {
    let exec = Exec { level: levels()[0], threads: 1 };
    let shape = [3, 5];
    let of = |dtype| Tensor::empty(dtype, Layout::C, &shape);
    let rows = |dtype| Tensor::empty(dtype, Layout::C, &[3]);
    let x = Tensor::floats(DType::F32, Layout::C, &shape, &[0.5; 15]);
    let y = Tensor::ints(DType::I64, Layout::C, &[3], &[1; 3]);
    let (x, labels) = (x.array(), y.array());
    let options = LossOptions::default();
    for axis in [2, 3, usize::MAX] {
        let (mut out, mut indices) = (of(DType::F32), of(DType::I64));
        let mut floats = [(); 2].map(|()| rows(DType::F32));
        let mut ints = [DType::I64, DType::Bool].map(rows);
        let [logprob, logsumexp] = &mut floats;
        let [argmax, greedy] = &mut ints;
        let scores = ops::Scores {
            logprob: logprob.out(),
            logsumexp: logsumexp.out(),
            argmax: argmax.out(),
            greedy: greedy.out(),
            entropy: None,
            rank: None,
        };
        let results = [
            ops::score_tokens(&exec, &x, axis, &labels, None, &scores),
            ops::topk_logprobs(&exec, &x, axis, &out.out(), &indices.out()),
            ops::kl_divergence(&exec, &x, &x, axis, 1.0, Reduction::Mean, None, None).map(drop),
            ops::softmax(&exec, &x, &[axis], &out.out()),
            ops::softmax_vjp(&exec, &x, &x, axis, &out.out()),
            ops::log_softmax_vjp(&exec, &x, &x, axis, &out.out()),
            ops::cross_entropy(&exec, &x, axis, &Target::Index(y.array()), &options, None, None).map(drop),
            ops::nll_loss(&exec, &x, axis, &labels, &options, None, None).map(drop),
        ];
        for (operation, result) in results.iter().enumerate() {
            assert!(matches!(result, Err(Error::Invalid(_))), "operation {operation}, axis {axis}: {result:?}");
        }
    }
}
