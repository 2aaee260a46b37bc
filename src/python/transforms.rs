//! Row transforms and their gradients.

use pyo3::prelude::*;
use pyo3::types::PyFloat;

use super::arrays::{Accept, View, view};
use super::config;
use super::errors::{self, shape as show, value_error};
use super::options;
use super::results::Output;
use crate::array::{Array, DType, Dims, Out};
use crate::ops::{self, Error, Exec};

type Transform = fn(&Exec, &Array<'_>, &[usize], &Out<'_>) -> Result<(), Error>;
type Vjp = fn(&Exec, &Array<'_>, &Array<'_>, usize, &Out<'_>) -> Result<(), Error>;

#[pyfunction]
#[pyo3(signature = (x, axis, out, /))]
pub(super) fn softmax<'py>(x: &Bound<'py, PyAny>, axis: &Bound<'py, PyAny>, out: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    transform(x, axis, out, ops::softmax)
}

#[pyfunction]
#[pyo3(signature = (x, axis, out, /))]
pub(super) fn log_softmax<'py>(x: &Bound<'py, PyAny>, axis: &Bound<'py, PyAny>, out: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    transform(x, axis, out, ops::log_softmax)
}

#[pyfunction]
#[pyo3(signature = (grad_output, probs, axis, out, /))]
pub(super) fn softmax_vjp<'py>(
    grad_output: &Bound<'py, PyAny>,
    probs: &Bound<'py, PyAny>,
    axis: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    vjp(grad_output, probs, "probs", axis, out, ops::softmax_vjp)
}

#[pyfunction]
#[pyo3(signature = (grad_output, log_probs, axis, out, /))]
pub(super) fn log_softmax_vjp<'py>(
    grad_output: &Bound<'py, PyAny>,
    log_probs: &Bound<'py, PyAny>,
    axis: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    vjp(grad_output, log_probs, "log_probs", axis, out, ops::log_softmax_vjp)
}

#[pyfunction]
#[pyo3(signature = (x, axis, keepdims, out, /))]
pub(super) fn logsumexp<'py>(
    x: &Bound<'py, PyAny>,
    axis: &Bound<'py, PyAny>,
    keepdims: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = x.py();
    let x = view(x, "x", Accept::Floats)?;
    let ndim = x.ndim();
    let axes = options::axes(axis, "x", ndim)?;
    let keepdims = options::flag(keepdims, "keepdims")?;
    let dtype = x.dtype().row_dtype();
    let whole = axes.len() >= ndim;
    if whole && out.is_none() && !(keepdims && ndim > 0) {
        return total(py, &x, &axes, dtype).map(|value| PyFloat::new(py, value).into_any());
    }
    let reduced = |i: usize| axes.contains(&i);
    let shape: Dims<usize> = (0..ndim).filter(|&i| keepdims || !reduced(i)).map(|i| if reduced(i) { 1 } else { x.shape()[i] }).collect();
    let result = if out.is_none() { Output::fresh(py, &shape, dtype)? } else { Output::given(out, &shape, dtype, false, &[("x", &x)])? };
    let rows = result.out_with_axes(|i| !(keepdims && reduced(i)));
    let array = with_an_axis(x.array());
    config::run(py, array.size(), |exec| ops::logsumexp(exec, &array, &axes, &rows))?.map_err(errors::internal)?;
    Ok(result.into_python())
}

/// logsumexp of everything, one number.
fn total(py: Python<'_>, x: &View<'_>, axes: &[usize], dtype: DType) -> PyResult<f64> {
    let array = with_an_axis(x.array());
    let (mut single, mut double) = ([0.0_f32], [0.0_f64]);
    let rows = if dtype == DType::F64 { Out::from_slice(&mut double, &[]) } else { Out::from_slice(&mut single, &[]) };
    config::run(py, array.size(), |exec| ops::logsumexp(exec, &array, axes, &rows))?.map_err(errors::internal)?;
    Ok(if dtype == DType::F64 { double[0] } else { f64::from(single[0]) })
}

/// A 0-d array as one of one axis, whose only class it is.
fn with_an_axis<'a>(x: &Array<'a>) -> Array<'a> {
    if !x.shape().is_empty() {
        return x.clone();
    }
    // SAFETY: the same single element.
    unsafe { Array::new(x.ptr, x.dtype(), x.swapped, &[1], &[x.dtype().size() as isize]) }
}

fn transform<'py>(
    x: &Bound<'py, PyAny>,
    axis: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
    compute: Transform,
) -> PyResult<Bound<'py, PyAny>> {
    let py = x.py();
    let x = view(x, "x", Accept::Floats)?;
    let axes = options::axes(axis, "x", x.ndim())?;
    let result = if out.is_none() { Output::like(py, x.array())? } else { Output::given(out, x.shape(), x.dtype(), true, &[("x", &x)])? };
    let array = with_an_axis(x.array());
    let probs = if x.ndim() == 0 { result.out_1d() } else { result.out().clone() };
    config::run(py, array.size(), |exec| compute(exec, &array, &axes, &probs))?.map_err(errors::internal)?;
    Ok(result.into_python())
}

fn vjp<'py>(
    grad_output: &Bound<'py, PyAny>,
    values: &Bound<'py, PyAny>,
    name: &'static str,
    axis: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
    compute: Vjp,
) -> PyResult<Bound<'py, PyAny>> {
    let py = values.py();
    let upstream = view(grad_output, "grad_output", Accept::Floats)?;
    let values = view(values, name, Accept::Floats)?;
    if upstream.shape() != values.shape() {
        return Err(value_error(format!(
            "grad_output has shape {}; it must have the shape of {name}, {}",
            show(upstream.shape()),
            show(values.shape())
        )));
    }
    let (_, axis) = options::axis(axis, name, values.ndim())?;
    let inputs = [(name, &values), ("grad_output", &upstream)];
    let result =
        if out.is_none() { Output::like(py, values.array())? } else { Output::given(out, values.shape(), values.dtype(), false, &inputs)? };
    let (g, y) = (with_an_axis(upstream.array()), with_an_axis(values.array()));
    let grad = if values.ndim() == 0 { result.out_1d() } else { result.out().clone() };
    config::run(py, y.size(), |exec| compute(exec, &g, &y, axis, &grad))?.map_err(errors::internal)?;
    Ok(result.into_python())
}
