//! Options that are numbers or names: parsed, checked, and the reasons given.

use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyFloat, PyString, PyTuple};

use super::errors::{axis_error, float, type_error, type_name, value_error};
use crate::array::{DType, Dims};
use crate::ops::Reduction;

/// `operator.index` into 64 bits.
pub(super) fn integer(object: &Bound<'_, PyAny>, argument: &str) -> PyResult<i64> {
    match object.extract::<i64>() {
        Ok(value) => Ok(value),
        Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => {
            Err(value_error(format!("{argument} = {} does not fit in a signed 64-bit integer", text(object))))
        }
        Err(error) if error.is_instance_of::<PyTypeError>(object.py()) => {
            Err(type_error(format!("{argument} must be an integer, got {}", type_name(object))))
        }
        Err(error) => Err(error),
    }
}

/// A real number as a double.
pub(super) fn real(object: &Bound<'_, PyAny>, argument: &str) -> PyResult<f64> {
    if let Ok(float) = object.cast_exact::<PyFloat>() {
        return Ok(float.value());
    }
    if let Some(given) = not_real(object)? {
        return Err(type_error(format!("{argument} must be a real number, got {} of dtype {given}", type_name(object))));
    }
    match object.extract::<f64>() {
        Ok(value) => Ok(value),
        Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => {
            Err(value_error(format!("{argument} = {} does not fit in a double", text(object))))
        }
        Err(error) if error.is_instance_of::<PyTypeError>(object.py()) => {
            Err(type_error(format!("{argument} must be a real number, got {}", type_name(object))))
        }
        Err(error) => Err(error),
    }
}

/// The dtype of a NumPy scalar or array that `float()` would take for a number although it is a complex one, a string, a date or a duration.
fn not_real(object: &Bound<'_, PyAny>) -> PyResult<Option<String>> {
    let py = object.py();
    let Some(dtype) = object.getattr_opt(intern!(py, "dtype"))? else { return Ok(None) };
    let kind = dtype.getattr_opt(intern!(py, "kind"))?.and_then(|kind| kind.extract::<String>().ok());
    // Those of ml_dtypes are of kind "V" too, but numbers.
    let builtin =
        |kind: &str| kind != "V" || dtype.getattr(intern!(py, "num")).and_then(|num| num.extract::<i32>()).is_ok_and(|num| num < 256);
    if kind.as_deref().is_some_and(|kind| matches!(kind, "c" | "S" | "U" | "M" | "m" | "V") && builtin(kind)) {
        dtype.str().map(|name| Some(name.to_string_lossy().into_owned()))
    } else {
        Ok(None)
    }
}

/// `str(object)`, shortened; integers may be too long for Python to print at all.
fn text(object: &Bound<'_, PyAny>) -> String {
    let full = object.str().map_or_else(|_| "a huge integer".to_owned(), |s| s.to_string_lossy().into_owned());
    if full.chars().count() > 40 { format!("{}...", full.chars().take(37).collect::<String>()) } else { full }
}

/// A real number in a domain; `accepted` completes "must be".
pub(super) fn number(object: &Bound<'_, PyAny>, argument: &str, accepted: &str, good: impl Fn(f64) -> bool) -> PyResult<f64> {
    let value = real(object, argument)?;
    if good(value) { Ok(value) } else { Err(value_error(format!("{argument} must be {accepted}, got {}", float(object.py(), value)))) }
}

/// The same, where `None` means that the option is off.
pub(super) fn optional(object: &Bound<'_, PyAny>, argument: &str, accepted: &str, good: impl Fn(f64) -> bool) -> PyResult<Option<f64>> {
    if object.is_none() { Ok(None) } else { number(object, argument, &format!("{accepted} or None"), good).map(Some) }
}

pub(super) fn positive(value: f64) -> bool {
    value > 0.0 && value.is_finite()
}

/// Positive, and so is its inverse in the type that logits of `dtype` are computed in.
pub(super) fn temperature(object: &Bound<'_, PyAny>, dtype: DType) -> PyResult<f64> {
    if dtype == DType::F64 {
        return number(object, "temperature", "a positive finite number, not subnormal", |value| positive(value) && value.is_normal());
    }
    let least = f64::from(f32::MIN_POSITIVE);
    number(object, "temperature", "a positive finite number, not subnormal in float32", |value| value.is_finite() && value >= least)
}

pub(super) fn reduction(object: &Bound<'_, PyAny>) -> PyResult<Reduction> {
    let py = object.py();
    // Literals in Python source are interned: most calls end at one of these comparisons of pointers.
    if object.is(intern!(py, "mean")) {
        return Ok(Reduction::Mean);
    }
    if object.is(intern!(py, "none")) {
        return Ok(Reduction::None);
    }
    match object.cast::<PyString>().ok().and_then(|name| name.to_str().ok()) {
        Some("mean") => Ok(Reduction::Mean),
        Some("sum") => Ok(Reduction::Sum),
        Some("none") => Ok(Reduction::None),
        _ => {
            let given = object.repr().map_or_else(|_| type_name(object), |r| r.to_string_lossy().into_owned());
            Err(value_error(format!("reduction must be 'mean', 'sum' or 'none', got {given}")))
        }
    }
}

/// A truth value.
pub(super) fn flag(object: &Bound<'_, PyAny>, argument: &str) -> PyResult<bool> {
    object.is_truthy().map_err(|error| {
        if !error.is_instance_of::<PyValueError>(object.py()) {
            return error;
        }
        let refused = type_error(format!("{argument} must be True or False, got {}: {}", type_name(object), error.value(object.py())));
        refused.set_cause(object.py(), Some(error));
        refused
    })
}

/// One axis: as given, and counted from the front. A 0-d array counts as one of one axis.
pub(super) fn axis(object: &Bound<'_, PyAny>, array: &str, ndim: usize) -> PyResult<(i64, usize)> {
    let given = integer(object, "axis")?;
    wrap(given, ndim.max(1)).map(|axis| (given, axis)).ok_or_else(|| axis_error(object.py(), array, given, ndim))
}

fn wrap(axis: i64, ndim: usize) -> Option<usize> {
    let ndim = ndim as i64;
    (-ndim..ndim).contains(&axis).then(|| axis.rem_euclid(ndim) as usize)
}

/// An axis, a tuple of axes, or `None` for all of them; sorted. The one axis a 0-d array counts as is always named: it has one class.
pub(super) fn axes(object: &Bound<'_, PyAny>, array: &str, ndim: usize) -> PyResult<Dims<usize>> {
    if object.is_none() || (ndim == 0 && object.cast::<PyTuple>().is_ok_and(PyTupleMethods::is_empty)) {
        return Ok((0..ndim.max(1)).collect());
    }
    let Ok(tuple) = object.cast::<PyTuple>() else {
        return Ok(Dims::from_slice(&[axis(object, array, ndim)?.1]));
    };
    let mut axes = Dims::<usize>::new();
    for item in tuple {
        let axis = axis(&item, array, ndim)?.1;
        let at = axes.partition_point(|&before| before < axis);
        if axes.get(at) == Some(&axis) {
            return Err(value_error(format!("axis = {} names an axis of {array} twice", text(object))));
        }
        axes.insert(at, axis);
    }
    Ok(axes)
}
