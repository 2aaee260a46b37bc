//! What the layers above say to the core: how to run, what to compute, what went wrong.

use core::fmt;

use crate::array::{Array, Out};
use crate::simd::Level;

/// How to run: chosen once per call by the caller, never read from globals by the core.
#[derive(Clone, Copy, Debug)]
pub struct Exec {
    /// Instruction set.
    pub level: Level,
    /// Upper bound on threads, the calling one included; at least 1.
    pub threads: usize,
}

/// What becomes of the row losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Weighted mean over the kept rows.
    Mean,
    /// Sum.
    Sum,
    /// One loss per row.
    None,
}

/// What the logits are compared with.
#[derive(Clone, Debug)]
pub enum Target<'a> {
    /// Class indices of any integer type; the logits' shape without the class axis.
    Index(Array<'a>),
    /// Class probabilities of any float type; the logits' shape.
    Probs(Array<'a>),
    /// `lam * loss(a) + (1 - lam) * loss(b)`; `lam` has the shape of the targets (broadcast a scalar with zero strides).
    Mixup {
        /// Class indices of the first side.
        a: Array<'a>,
        /// Class indices of the second side.
        b: Array<'a>,
        /// Share of the first side, in [0, 1] (checked by the core).
        lam: Array<'a>,
    },
    /// A few classes per row with their probabilities; both have the shape of the rows + (k,).
    Sparse {
        /// Class indices.
        indices: Array<'a>,
        /// Their probabilities.
        probs: Array<'a>,
    },
}

/// Options of the losses. All are data: none selects a kernel of its own.
#[derive(Clone, Debug)]
pub struct LossOptions<'a> {
    /// Weight per class, shape (C,), any real type.
    pub weight: Option<Array<'a>>,
    /// Index that marks rows to leave out.
    pub ignore_index: Option<i64>,
    /// Share of the target spread over the classes, in [0, 1].
    pub label_smoothing: f64,
    /// Reduction over rows.
    pub reduction: Reduction,
    /// Weight per row, the shape of the rows, any real type; 0 leaves the row out.
    pub sample_weight: Option<Array<'a>>,
    /// Replaces the divisor of the mean.
    pub normalizer: Option<f64>,
    /// Adds `z_loss * logsumexp^2`.
    pub z_loss: f64,
    /// Logits become `softcap * tanh(logits / softcap)`.
    pub softcap: Option<f64>,
    /// Logits are divided by it.
    pub temperature: f64,
    /// Boolean, the shape of the logits (broadcast with zero strides); False classes are left out.
    pub mask: Option<Array<'a>>,
}

impl Default for LossOptions<'_> {
    fn default() -> Self {
        Self {
            weight: None,
            ignore_index: Some(-100),
            label_smoothing: 0.0,
            reduction: Reduction::Mean,
            sample_weight: None,
            normalizer: None,
            z_loss: 0.0,
            softcap: None,
            temperature: 1.0,
            mask: None,
        }
    }
}

/// What multiplies the gradient.
#[derive(Clone, Debug)]
pub enum GradOutput<'a> {
    /// One number.
    Scalar(f64),
    /// One per row, the shape of the rows, any float type.
    Rows(Array<'a>),
}

/// Where the gradient goes.
#[derive(Clone, Debug)]
pub struct Grad<'a> {
    /// The logits' shape and type; may be the logits themselves.
    pub out: Out<'a>,
    /// Upstream gradient.
    pub grad_output: GradOutput<'a>,
}

/// What the core can refuse. Positions are flat C-order indices into the named argument, as the caller sees it.
#[derive(Clone, Debug, PartialEq)]
pub enum Error {
    /// A class index that is neither a class nor `ignore_index`.
    TargetOutOfBounds {
        /// `target`, `y_a`, `y_b` or `indices`.
        argument: &'static str,
        /// Flat position.
        position: usize,
        /// What stands there.
        value: i128,
    },
    /// A value of a row argument outside its domain.
    BadValue {
        /// Its name in the public API.
        argument: &'static str,
        /// Flat position.
        position: usize,
        /// What stands there.
        value: f64,
    },
    /// Shapes or types the binding should not have let through.
    Invalid(&'static str),
    /// Scratch memory could not be had.
    OutOfMemory,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TargetOutOfBounds { argument, position, value } => {
                write!(f, "{argument}: class index {value} at flat position {position} is out of bounds")
            }
            Self::BadValue { argument, position, value } => write!(f, "{argument}: bad value {value} at flat position {position}"),
            Self::Invalid(what) => f.write_str(what),
            Self::OutOfMemory => f.write_str("out of memory"),
        }
    }
}

impl core::error::Error for Error {}
