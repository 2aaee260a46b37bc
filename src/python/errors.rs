//! Messages: the argument, what was given, what is accepted, and the remedy.

use core::fmt::Write;

use pyo3::exceptions::{PyIndexError, PyMemoryError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyFloat, PyType};

use crate::ops::Error;

pub(super) fn value_error(message: impl Into<String>) -> PyErr {
    PyValueError::new_err(message.into())
}

pub(super) fn type_error(message: impl Into<String>) -> PyErr {
    PyTypeError::new_err(message.into())
}

pub(super) fn out_of_memory(bytes: usize) -> PyErr {
    PyMemoryError::new_err(format!("no memory for a result of {bytes} bytes; pass out= to reuse an array"))
}

/// NumPy's own exception for an axis that is not there.
pub(super) fn axis_error(py: Python<'_>, argument: &str, axis: i64, ndim: usize) -> PyErr {
    static TYPE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    match TYPE.import(py, "numpy.exceptions", "AxisError").and_then(|kind| kind.call1((axis, ndim, argument))) {
        Ok(error) => PyErr::from_value(error),
        Err(error) => error,
    }
}

/// `name` of the type of an object, with its module unless that is `builtins`.
pub(super) fn type_name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().fully_qualified_name().map_or_else(|_| "an object".to_owned(), |name| name.to_string())
}

/// A shape as Python writes it.
pub(super) fn shape(dims: &[usize]) -> String {
    let mut text = String::from("(");
    for (i, len) in dims.iter().enumerate() {
        let _ = write!(text, "{}{len}", if i > 0 { ", " } else { "" });
    }
    text.push_str(if dims.len() == 1 { ",)" } else { ")" });
    text
}

/// A number as Python writes it.
pub(super) fn float(py: Python<'_>, value: f64) -> String {
    PyFloat::new(py, value).to_string()
}

/// `name[3, 4]` for a flat C-order position; the bare name for a 0-d array.
fn element(name: &str, position: usize, dims: &[usize]) -> String {
    let mut rest = position;
    let mut index: Vec<String> = dims
        .iter()
        .rev()
        .map(|&len| {
            let at = rest % len.max(1);
            rest /= len.max(1);
            at.to_string()
        })
        .collect();
    index.reverse();
    if index.is_empty() { name.to_owned() } else { format!("{name}[{}]", index.join(", ")) }
}

/// What a message about an error of the core needs to know of the call.
pub(super) struct Context<'a> {
    /// "logits" or "`log_probs`".
    pub(super) logits: &'static str,
    /// Their shape.
    pub(super) shape: &'a [usize],
    /// The class axis as the caller gave it, and as it is.
    pub(super) axis: (i64, usize),
    /// Shape of the target (or of `indices`).
    pub(super) target: &'a [usize],
    /// Whether the function takes `ignore_index` for this target.
    pub(super) can_ignore: bool,
}

impl Context<'_> {
    pub(super) fn raise(&self, py: Python<'_>, error: Error) -> PyErr {
        match error {
            Error::TargetOutOfBounds { argument, position, value } => {
                let name = if matches!(argument, "target" | "tokens") { argument.to_owned() } else { format!("target.{argument}") };
                let mut message = format!(
                    "{} = {value} is out of bounds for {} classes (axis {} of {} with shape {})",
                    element(&name, position, self.target),
                    self.shape[self.axis.1],
                    self.axis.0,
                    self.logits,
                    shape(self.shape),
                );
                if value > i128::from(i64::MAX) {
                    // ignore_index is a signed number of 64 bits; so large a label is a negative one that was cast.
                    let _ = write!(message, "; if it marks padding, pass {name}.astype(numpy.int64) and ignore_index={}", value as i64);
                } else if self.can_ignore {
                    let _ = write!(message, "; if it marks padding, pass ignore_index={value}");
                } else {
                    message.push_str("; pad with a class in range and probability 0");
                }
                PyIndexError::new_err(message)
            }
            Error::BadValue { argument, position, value } => {
                let rows: Vec<usize> = self.shape.iter().enumerate().filter(|(i, _)| *i != self.axis.1).map(|(_, &len)| len).collect();
                let (name, accepted) = match argument {
                    "sample_weight" => ("sample_weight", "a weight of a row is neither negative nor nan (0 leaves the row out)"),
                    "lam" => ("target.lam", "the share of y_a lies in [0, 1]"),
                    other => (other, "it is outside the domain of the argument"),
                };
                value_error(format!("{} = {}: {accepted}", element(name, position, &rows), float(py, value)))
            }
            other => internal(other),
        }
    }
}

/// Errors of the core that have nothing to do with values. By value, as `map_err` gives them.
#[allow(clippy::needless_pass_by_value)]
pub(super) fn internal(error: Error) -> PyErr {
    match error {
        Error::OutOfMemory => PyMemoryError::new_err("no memory for scratch space"),
        // Not `Display`, which would bring the formatting of numbers along.
        Error::Invalid(what) => bug(what),
        Error::TargetOutOfBounds { argument, .. } | Error::BadValue { argument, .. } => bug(argument),
    }
}

fn bug(what: &str) -> PyErr {
    PyRuntimeError::new_err(format!("crossent: {what}; this is a bug, please report it"))
}
