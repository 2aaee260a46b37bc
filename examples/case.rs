//! One call of the core on fixed numbers, for tools that count or trace: `case LEVEL OPERATION ROWSxCLASSES DTYPE`, with an F
//! after the shape in Fortran order.
//!
//! Only `measured` is of interest: what it works on was made and touched before.

use std::process::ExitCode;

use crossent::array::{Array, DType, Element, Out};
use crossent::ops::{Error, Exec, Grad, GradOutput, LossOptions, Target, cross_entropy, log_softmax};
use crossent::simd::Level;
use half::{bf16, f16};

#[derive(Clone, Copy)]
enum Operation {
    Loss,
    Gradient,
    Smoothed,
    LogSoftmax,
}

#[inline(always)]
fn call(exec: &Exec, operation: Operation, x: &Array, axis: usize, target: &Target, out: Out) -> Result<f64, Error> {
    let mut options = LossOptions::default();
    if matches!(operation, Operation::Smoothed) {
        options.label_smoothing = 0.1;
    }
    match operation {
        Operation::Loss => cross_entropy(exec, x, axis, target, &options, None, None),
        Operation::Gradient | Operation::Smoothed => {
            cross_entropy(exec, x, axis, target, &options, None, Some(&Grad { out, grad_output: GradOutput::Scalar(1.0) }))
        }
        Operation::LogSoftmax => log_softmax(exec, x, &[axis], &out).map(|()| 0.0),
    }
}

#[inline(never)]
fn measured(exec: &Exec, operation: Operation, x: &Array, axis: usize, target: &Target, out: Out) -> Result<f64, Error> {
    call(exec, operation, x, axis, target, out)
}

fn run<E: Element>(exec: &Exec, operation: Operation, rows: usize, classes: usize, axis: usize) -> Result<f64, Error> {
    // A linear congruential generator: the same numbers everywhere.
    let mut state = 12345_u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / f64::from(1_u32 << 31)
    };
    let values: Vec<E> = (0..rows * classes).map(|_| E::from_f64((next() + next() + next() + next() - 2.0) * 5.0)).collect();
    let labels: Vec<i64> = (0..rows).map(|_| (next() * classes as f64) as i64).collect();
    let mut result = vec![E::from_f64(0.0); rows * classes];
    let shape = if axis == 1 { [rows, classes] } else { [classes, rows] };
    let x = Array::from_slice(&values, &shape);
    // SAFETY: the labels live until the end of this function and nobody else writes to them.
    let target = Target::Index(unsafe { Array::new(labels.as_ptr().cast(), DType::I64, false, &[rows], &[8]) });
    // The first call makes the scratch memory and looks at the machine.
    call(exec, operation, &x, axis, &target, Out::from_slice(&mut result, &shape))?;
    measured(exec, operation, &x, axis, &target, Out::from_slice(&mut result, &shape))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let parsed = || {
        let [level, operation, shape, dtype] = &arguments[..] else { return None };
        let operation = match operation.as_str() {
            "loss" => Operation::Loss,
            "gradient" => Operation::Gradient,
            "smoothed" => Operation::Smoothed,
            "log_softmax" => Operation::LogSoftmax,
            _ => return None,
        };
        let axis = usize::from(!shape.ends_with('F'));
        let (rows, classes) = shape.trim_end_matches('F').split_once('x')?;
        Some((Level::from_name(level)?, operation, rows.parse().ok()?, classes.parse().ok()?, axis, dtype.clone()))
    };
    let Some((level, operation, rows, classes, axis, dtype)) = parsed() else {
        eprintln!(
            "usage: case avx2|avx512|neon|scalar loss|gradient|smoothed|log_softmax ROWSxCLASSES[F] float16|bfloat16|float32|float64"
        );
        return ExitCode::FAILURE;
    };
    if !level.available() {
        eprintln!("this machine lacks {}", level.name());
        return ExitCode::FAILURE;
    }
    let exec = Exec { level, threads: 1 };
    let value = match dtype.as_str() {
        "float16" => run::<f16>(&exec, operation, rows, classes, axis),
        "bfloat16" => run::<bf16>(&exec, operation, rows, classes, axis),
        "float32" => run::<f32>(&exec, operation, rows, classes, axis),
        _ => run::<f64>(&exec, operation, rows, classes, axis),
    };
    match value {
        Ok(value) => {
            println!("{value}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
