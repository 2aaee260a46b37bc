//! Targets and the other arguments that come per row or per class: their shapes, and what a wrong one was probably meant to be.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyFloat, PyInt, PyTuple, PyType};

use super::arrays::{Accept, View, is_ndarray, name_of, view};
use super::errors::{shape as show, type_error, value_error};
use super::options;
use crate::array::{Array, DType, Dims};
use crate::ops::{GradOutput, Reduction, Target};

/// The logits of a call, for shapes and messages.
pub(super) struct Logits<'a> {
    pub(super) name: &'static str,
    pub(super) shape: &'a [usize],
    pub(super) axis: (i64, usize),
    /// The shape without the class axis.
    pub(super) rows: Dims<usize>,
}

impl Logits<'_> {
    pub(super) fn classes(&self) -> usize {
        self.shape[self.axis.1]
    }

    fn describe(&self) -> String {
        format!("{} with shape {} and axis={}", self.name, show(self.shape), self.axis.0)
    }
}

/// A target whose views are alive.
pub(super) enum Goal<'py> {
    Index(View<'py>),
    Probs(View<'py>),
    Mixup { a: View<'py>, b: View<'py>, lam: Share<'py> },
    Sparse { indices: View<'py>, probs: View<'py> },
}

pub(super) enum Share<'py> {
    Number(f64),
    Rows(View<'py>),
}

impl<'py> Goal<'py> {
    /// For the core. A number is lent with zero strides, as if it stood in every row.
    pub(super) fn target(&self, rows: &[usize]) -> Target<'_> {
        match self {
            Self::Index(y) => Target::Index(y.array().clone()),
            Self::Probs(p) => Target::Probs(p.array().clone()),
            Self::Mixup { a, b, lam } => {
                let lam = match lam {
                    Share::Number(number) => repeat(&Array::from_slice(core::slice::from_ref(number), &[]), rows),
                    Share::Rows(rows_of) if rows_of.ndim() == 0 => repeat(rows_of.array(), rows),
                    Share::Rows(rows_of) => rows_of.array().clone(),
                };
                Target::Mixup { a: a.array().clone(), b: b.array().clone(), lam }
            }
            Self::Sparse { indices, probs } => Target::Sparse { indices: indices.array().clone(), probs: probs.array().clone() },
        }
    }

    /// Whether it gives probabilities, for which there is no index to ignore.
    pub(super) fn is_probable(&self) -> bool {
        matches!(self, Self::Probs(_) | Self::Sparse { .. })
    }

    /// The shape that positions in messages refer to.
    pub(super) fn shape(&self) -> &[usize] {
        match self {
            Self::Index(y) | Self::Probs(y) | Self::Mixup { a: y, .. } | Self::Sparse { indices: y, .. } => y.shape(),
        }
    }

    /// Its arrays, for the check of overlaps.
    pub(super) fn each<'a>(&'a self, arrays: &mut Vec<(&'static str, &'a View<'py>)>) {
        match self {
            Self::Index(y) | Self::Probs(y) => arrays.push(("target", y)),
            Self::Mixup { a, b, lam } => {
                arrays.extend([("target.y_a", a), ("target.y_b", b)]);
                if let Share::Rows(lam) = lam {
                    arrays.push(("target.lam", lam));
                }
            }
            Self::Sparse { indices, probs } => arrays.extend([("target.indices", indices), ("target.probs", probs)]),
        }
    }
}

/// A 0-d array seen as one of `shape`, the same element everywhere.
fn repeat<'a>(scalar: &Array<'a>, shape: &[usize]) -> Array<'a> {
    let still: Dims<isize> = shape.iter().map(|_| 0).collect();
    // SAFETY: zero strides reach the one element of the 0-d array only.
    unsafe { Array::new(scalar.ptr, scalar.dtype(), scalar.swapped, shape, &still) }
}

/// Class indices, as `nll_loss` takes them.
pub(super) fn indices<'py>(object: &Bound<'py, PyAny>, logits: &Logits<'_>) -> PyResult<Goal<'py>> {
    if composite(object)?.is_some() {
        return Err(type_error("target must be class indices here; Mixup and SparseProbs are for cross_entropy"));
    }
    class_indices(object, "target", logits).map(Goal::Index)
}

/// Any target, as `cross_entropy` takes them.
pub(super) fn any<'py>(object: &Bound<'py, PyAny>, logits: &Logits<'_>) -> PyResult<Goal<'py>> {
    match composite(object)? {
        Some(Composite::Mixup(parts)) => {
            let lam = parts.get_item(2)?;
            Ok(Goal::Mixup {
                a: class_indices(&parts.get_item(0)?, "target.y_a", logits)?,
                b: class_indices(&parts.get_item(1)?, "target.y_b", logits)?,
                lam: share(&lam, logits)?,
            })
        }
        Some(Composite::Sparse(parts)) => {
            let indices = view(&parts.get_item(0)?, "target.indices", Accept::Integers)?;
            let probs = view(&parts.get_item(1)?, "target.probs", Accept::Floats)?;
            let good =
                indices.shape() == probs.shape() && indices.shape().split_last().is_some_and(|(_, rows)| rows == logits.rows.as_slice());
            if !good {
                let rows: Vec<String> = logits.rows.iter().map(ToString::to_string).chain(["k".to_owned()]).collect();
                return Err(value_error(format!(
                    "target.indices has shape {} and target.probs {}; for {} both have shape ({}{})",
                    show(indices.shape()),
                    show(probs.shape()),
                    logits.describe(),
                    rows.join(", "),
                    if rows.len() == 1 { "," } else { "" },
                )));
            }
            Ok(Goal::Sparse { indices, probs })
        }
        None => {
            let target = view(object, "target", Accept::Target)?;
            if target.dtype().is_float() {
                probabilities(target, logits).map(Goal::Probs)
            } else {
                labels(target, "target", logits).map(Goal::Index)
            }
        }
    }
}

enum Composite<'py> {
    Mixup(Bound<'py, PyTuple>),
    Sparse(Bound<'py, PyTuple>),
}

/// The facade's named tuples; arrays never get to the comparison of types.
fn composite<'py>(object: &Bound<'py, PyAny>) -> PyResult<Option<Composite<'py>>> {
    static MIXUP: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    static SPARSE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let py = object.py();
    if is_ndarray(object) {
        return Ok(None);
    }
    let Ok(tuple) = object.cast::<PyTuple>() else { return Ok(None) };
    if tuple.is_instance(MIXUP.import(py, "crossent._types", "Mixup")?)? {
        return Ok(Some(Composite::Mixup(tuple.clone())));
    }
    if tuple.is_instance(SPARSE.import(py, "crossent._types", "SparseProbs")?)? {
        return Ok(Some(Composite::Sparse(tuple.clone())));
    }
    Ok(None)
}

/// Class indices that are called `argument`.
pub(super) fn class_indices<'py>(object: &Bound<'py, PyAny>, argument: &'static str, logits: &Logits<'_>) -> PyResult<View<'py>> {
    labels(view(object, argument, Accept::Integers)?, argument, logits)
}

fn labels<'py>(target: View<'py>, argument: &str, logits: &Logits<'_>) -> PyResult<View<'py>> {
    if target.shape() == logits.rows.as_slice() {
        return Ok(target);
    }
    let remedy = if argument == "target" && target.shape() == logits.shape {
        format!("; class probabilities must be floats: {argument}.astype(numpy.float32)")
    } else {
        other_axis(target.shape(), argument, logits)
    };
    Err(value_error(format!(
        "{argument} has shape {}; class indices for {} have shape {}{remedy}",
        show(target.shape()),
        logits.describe(),
        show(&logits.rows)
    )))
}

fn probabilities<'py>(target: View<'py>, logits: &Logits<'_>) -> PyResult<View<'py>> {
    if target.shape() == logits.shape {
        return Ok(target);
    }
    if target.shape() == logits.rows.as_slice() {
        return Err(type_error(format!(
            "target has dtype {} and the shape of class indices, which must be integers; convert with target.astype(numpy.int64)",
            name_of(target.dtype())
        )));
    }
    Err(value_error(format!(
        "target has shape {} and dtype {}; class probabilities for {} have its shape, class indices have shape {} and an integer dtype",
        show(target.shape()),
        name_of(target.dtype()),
        logits.describe(),
        show(&logits.rows)
    )))
}

/// The remedy for labels that fit another class axis, first of all axis 1, where other libraries have the classes.
fn other_axis(given: &[usize], argument: &str, logits: &Logits<'_>) -> String {
    let fits = |axis: &usize| {
        let rows = logits.shape.iter().enumerate().filter(|(i, _)| i != axis).map(|(_, len)| len);
        rows.eq(given)
    };
    let ndim = logits.shape.len();
    if let Some(axis) = [1].into_iter().chain(0..ndim).filter(|&axis| axis < ndim).find(fits) {
        return format!("; if the classes are on axis {axis}, pass axis={axis}");
    }
    let long = |len: &&usize| **len != 1;
    if given.len() > logits.rows.len() && given.iter().filter(long).eq(logits.rows.iter().filter(long)) {
        return format!("; drop the axis of length 1, as in {argument}.squeeze()");
    }
    String::new()
}

fn share<'py>(object: &Bound<'py, PyAny>, logits: &Logits<'_>) -> PyResult<Share<'py>> {
    const NAME: &str = "target.lam";
    if object.is_exact_instance_of::<PyFloat>() || object.is_exact_instance_of::<PyInt>() {
        return options::number(object, NAME, "in [0, 1]", |lam| (0.0..=1.0).contains(&lam)).map(Share::Number);
    }
    let lam = view(object, NAME, Accept::Reals)?;
    if lam.ndim() == 0 || lam.shape() == logits.rows.as_slice() {
        return Ok(Share::Rows(lam));
    }
    Err(value_error(format!(
        "{NAME} has shape {}; it must be one number or have the shape of the rows, {}",
        show(lam.shape()),
        show(&logits.rows)
    )))
}

/// `weight`: one real number per class.
pub(super) fn weight<'py>(object: &Bound<'py, PyAny>, logits: &Logits<'_>) -> PyResult<Option<View<'py>>> {
    if object.is_none() {
        return Ok(None);
    }
    let weight = view(object, "weight", Accept::Reals)?;
    if weight.shape() != [logits.classes()] {
        return Err(value_error(format!(
            "weight has shape {}; one weight per class of {} has shape ({},)",
            show(weight.shape()),
            logits.describe(),
            logits.classes()
        )));
    }
    Ok(Some(weight))
}

/// `sample_weight`: one real number per row.
pub(super) fn sample_weight<'py>(object: &Bound<'py, PyAny>, logits: &Logits<'_>) -> PyResult<Option<View<'py>>> {
    if object.is_none() {
        return Ok(None);
    }
    let weight = view(object, "sample_weight", Accept::Reals)?;
    if weight.shape() != logits.rows.as_slice() {
        return Err(value_error(format!(
            "sample_weight has shape {}; one weight per row of {} has shape {}",
            show(weight.shape()),
            logits.describe(),
            show(&logits.rows)
        )));
    }
    Ok(Some(weight))
}

/// `where`: truth values that broadcast to the logits.
pub(super) fn mask<'py>(object: &Bound<'py, PyAny>, logits: &Logits<'_>) -> PyResult<Option<View<'py>>> {
    if object.is_none() {
        return Ok(None);
    }
    let mask = view(object, "where", Accept::Bools)?;
    let fits =
        mask.ndim() <= logits.shape.len() && mask.shape().iter().rev().zip(logits.shape.iter().rev()).all(|(&m, &x)| m == x || m == 1);
    if !fits {
        return Err(value_error(format!(
            "where has shape {}, which does not broadcast to {} with shape {}",
            show(mask.shape()),
            logits.name,
            show(logits.shape)
        )));
    }
    Ok(Some(mask))
}

/// A mask seen with the shape of the logits.
pub(super) fn broadcast<'a>(mask: &'a View<'_>, shape: &[usize]) -> Array<'a> {
    let array = mask.array();
    let missing = shape.len() - array.shape().len();
    let strides: Dims<isize> = (0..shape.len())
        .map(|i| match i.checked_sub(missing) {
            Some(j) if array.shape()[j] == shape[i] => array.strides()[j],
            _ => 0,
        })
        .collect();
    // SAFETY: axes that were missing or of length 1 get zero strides, so that only elements of the mask are reached.
    unsafe { Array::new(array.ptr, DType::Bool, false, shape, &strides) }
}

/// `grad_output` whose view is alive.
pub(super) enum Upstream<'py> {
    Number(f64),
    Rows(View<'py>),
}

impl Upstream<'_> {
    pub(super) fn grad_output(&self) -> GradOutput<'_> {
        match self {
            Self::Number(number) => GradOutput::Scalar(*number),
            Self::Rows(rows) => GradOutput::Rows(rows.array().clone()),
        }
    }
}

/// `grad_output`: one number, or with reduction "none" one per row.
pub(super) fn upstream<'py>(object: &Bound<'py, PyAny>, reduction: Reduction, logits: &Logits<'_>) -> PyResult<Upstream<'py>> {
    const NAME: &str = "grad_output";
    if object.is_none() {
        return Ok(Upstream::Number(1.0));
    }
    if object.is_exact_instance_of::<PyFloat>() || object.is_exact_instance_of::<PyInt>() {
        return options::real(object, NAME).map(Upstream::Number);
    }
    let rows = view(object, NAME, Accept::Reals)?;
    if rows.ndim() == 0 {
        return options::real(object, NAME).map(Upstream::Number);
    }
    if reduction != Reduction::None || rows.shape() != logits.rows.as_slice() {
        let more =
            if reduction == Reduction::None { format!(" or have the shape of the rows, {}", show(&logits.rows)) } else { String::new() };
        let hint = if rows.shape() == logits.rows.as_slice() { "; one per row needs reduction='none'" } else { "" };
        return Err(value_error(format!("{NAME} has shape {}; it must be one number{more}{hint}", show(rows.shape()))));
    }
    if rows.dtype().is_float() {
        return Ok(Upstream::Rows(rows));
    }
    // One number per row is little: converted, so that the core has only floats to read.
    let py = object.py();
    let double = py.import("numpy")?.call_method1(intern!(py, "asarray"), (object, intern!(py, "float64")))?;
    view(&double, NAME, Accept::Reals).map(Upstream::Rows)
}
