//! Results: fresh arrays, recycled memory, the argument `out`, and what may overlap what.

use core::ffi::{c_int, c_void};

use numpy::npyffi::{NPY_ARRAY_ALIGNED, NPY_ARRAY_WRITEABLE, PY_ARRAY_API, PyArrayObject, npy_intp};
use pyo3::exceptions::PyMemoryError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyType};

use super::arrays::{self, View};
use super::errors::{out_of_memory, value_error};
use crate::array::{Array, DType, Dims, Out, c_strides};
use crate::memory::{Buffer, RECYCLE_FROM};

/// An array to write and the object that goes back to the caller.
#[derive(Debug)]
pub(super) struct Output<'py> {
    object: Bound<'py, PyAny>,
    out: Out<'py>,
    given: bool,
}

impl<'py> Output<'py> {
    /// The memory for the core, while the result lives.
    pub(super) fn out(&self) -> &Out<'_> {
        &self.out
    }

    /// The memory seen with other axes, of which none is new: `keep` names those that stay.
    pub(super) fn out_with_axes(&self, keep: impl Fn(usize) -> bool) -> Out<'_> {
        let array = self.out.array();
        let kept = |i: &usize| keep(*i);
        let shape: Dims<usize> = (0..array.shape().len()).filter(kept).map(|i| array.shape()[i]).collect();
        let strides: Dims<isize> = (0..array.shape().len()).filter(kept).map(|i| array.strides()[i]).collect();
        // SAFETY: the axes left out have length 1 (callers drop only those), so that the same elements are reached.
        unsafe { Out::new(array.ptr, array.dtype(), &shape, &strides) }
    }

    /// A 0-d result with one axis of length 1, for the core, which reduces over an axis.
    pub(super) fn out_1d(&self) -> Out<'_> {
        let array = self.out.array();
        // SAFETY: one element, the one of the 0-d array.
        unsafe { Out::new(array.ptr, array.dtype(), &[1], &[array.dtype().size() as isize]) }
    }

    /// What the caller gets: `out` itself, or the fresh array, as a NumPy scalar when it has no axis left.
    pub(super) fn into_python(self) -> Bound<'py, PyAny> {
        if self.given || !self.out.array().shape().is_empty() {
            return self.object;
        }
        let py = self.object.py();
        let array = self.object.into_ptr().cast::<PyArrayObject>();
        // SAFETY: steals a reference to an ndarray, returns a new one to a scalar.
        unsafe { Bound::from_owned_ptr_or_opt(py, PY_ARRAY_API.PyArray_Return(py, array)) }.unwrap_or_else(|| py.None().into_bound(py))
    }

    /// The argument `out`, checked; `inputs` must not share memory with it, but the first may be it where `in_place` says so.
    pub(super) fn given(
        object: &Bound<'py, PyAny>,
        shape: &[usize],
        dtype: DType,
        in_place: bool,
        inputs: &[(&'static str, &View<'py>)],
    ) -> PyResult<Self> {
        let view = arrays::writable(object, shape, dtype)?;
        let mut strides = Dims::from_slice(view.array().strides());
        for (i, (name, input)) in inputs.iter().enumerate() {
            if i == 0 && in_place && same_array(view.array(), input.array()) {
                // Strides of axes of length 1 mean nothing; taken from the input, the core sees the very same array.
                strides = Dims::from_slice(input.array().strides());
            } else if shares_memory(&view, input)? {
                let allowed = if in_place { format!("; only {} itself may be passed as out", inputs[0].0) } else { String::new() };
                return Err(value_error(format!("out overlaps {name} in memory{allowed}; pass an array of its own")));
            }
        }
        // SAFETY: `writable` has checked that it is aligned, native, writable and free of overlaps, and the loop above that no input overlaps.
        let out = unsafe { Out::new(view.array().ptr, dtype, shape, &strides) };
        Ok(Self { object: object.clone(), out, given: true })
    }

    /// A fresh C-ordered array.
    pub(super) fn fresh(py: Python<'py>, shape: &[usize], dtype: DType) -> PyResult<Self> {
        let strides = c_strides(shape, dtype.size());
        Self::allocate(py, shape, &strides, dtype)
    }

    /// A fresh array in the memory order of another of its shape, as `numpy.empty_like` makes it.
    pub(super) fn like(py: Python<'py>, prototype: &Array<'_>) -> PyResult<Self> {
        let shape = prototype.shape();
        let strides = ordered_like(prototype);
        Self::allocate(py, shape, &strides, prototype.dtype())
    }

    fn allocate(py: Python<'py>, shape: &[usize], strides: &[isize], dtype: DType) -> PyResult<Self> {
        let bytes =
            shape.iter().try_fold(dtype.size(), |bytes, &len| bytes.checked_mul(len)).filter(|&bytes| isize::try_from(bytes).is_ok());
        // Any zero makes it 0 bytes, but an overflow before it does not matter to a fold that starts with the zero.
        let bytes = if shape.contains(&0) { 0 } else { bytes.ok_or_else(|| out_of_memory(usize::MAX))? };
        let (data, owner) = if bytes >= RECYCLE_FROM {
            recycled(py, bytes).map(|(data, owner)| (data, Some(owner)))?
        } else {
            (core::ptr::null_mut(), None)
        };
        let flags: c_int = if owner.is_some() { NPY_ARRAY_WRITEABLE | NPY_ARRAY_ALIGNED } else { 0 };
        let mut dims: Dims<npy_intp> = shape.iter().map(|&len| len as npy_intp).collect();
        let mut steps: Dims<npy_intp> = Dims::from_slice(strides);
        let descr = arrays::descr(py, dtype)?;
        // SAFETY: dims and strides have `ndim` entries and are copied; the dtype's reference is stolen; `data` is null (NumPy allocates) or owns
        // `bytes` bytes, which is what these strides, a permutation of C order, reach.
        let object = unsafe {
            let ndim = dims.len() as c_int;
            let array = PY_ARRAY_API.PyArray_NewFromDescr(
                py,
                arrays::array_type(py),
                descr,
                ndim,
                dims.as_mut_ptr(),
                steps.as_mut_ptr(),
                data,
                flags,
                core::ptr::null_mut(),
            );
            Bound::from_owned_ptr_or_err(py, array)?
        };
        let pointer = if let Some(owner) = owner {
            // SAFETY: the array is fresh and has no base; the reference to the owner is stolen, also on failure.
            if unsafe { PY_ARRAY_API.PyArray_SetBaseObject(py, object.as_ptr().cast(), owner.into_ptr()) } != 0 {
                return Err(PyErr::fetch(py));
            }
            data.cast()
        } else {
            arrays::data(&object)
        };
        // SAFETY: fresh memory of the array's own: writable, aligned, each element once, and the result holds a reference to the array.
        let out = unsafe { Out::new(pointer, dtype, shape, strides) };
        Ok(Self { object, out, given: false })
    }
}

/// Memory for a large result and what has to become the base of the array over it: an array of bytes, whose base owns the memory in turn. NumPy
/// lets an array be made writeable again only over a base that is, which an array can say of itself; and as the type of this one is its own,
/// views of the result have the result as their base, as they would otherwise.
fn recycled(py: Python<'_>, bytes: usize) -> PyResult<(*mut c_void, Bound<'_, PyAny>)> {
    static MEMORY: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let kind = MEMORY.get_or_try_init(py, || {
        let ndarray = py.import("numpy")?.getattr("ndarray")?;
        let members = PyDict::new(py);
        members.set_item("__module__", "crossent._core")?;
        members.set_item("__slots__", ())?;
        let kind = py.get_type::<PyType>().call1(("_Memory", (ndarray,), members))?;
        Ok::<_, PyErr>(kind.cast_into::<PyType>()?.unbind())
    })?;
    let buffer = Buffer::new(bytes).ok_or_else(|| out_of_memory(bytes))?;
    let data: *mut c_void = buffer.as_ptr().cast();
    let owner = Bound::new(py, Recycled { _buffer: buffer })?;
    let descr = arrays::descr(py, DType::U8)?;
    let mut len = bytes as npy_intp;
    // SAFETY: one axis of `bytes` bytes that `data` has; the dtype's reference is stolen; the type is a subclass of ndarray without fields.
    let memory = unsafe {
        let array = PY_ARRAY_API.PyArray_NewFromDescr(
            py,
            kind.bind(py).as_type_ptr(),
            descr,
            1,
            &raw mut len,
            core::ptr::null_mut(),
            data,
            NPY_ARRAY_WRITEABLE | NPY_ARRAY_ALIGNED,
            core::ptr::null_mut(),
        );
        Bound::from_owned_ptr_or_err(py, array)?
    };
    // SAFETY: the array is fresh and has no base; the reference to the owner is stolen, also on failure.
    if unsafe { PY_ARRAY_API.PyArray_SetBaseObject(py, memory.as_ptr().cast(), owner.into_ptr()) } != 0 {
        return Err(PyErr::fetch(py));
    }
    Ok((data, memory))
}

/// Owns the memory of a large result.
#[pyclass(frozen, module = "crossent._core", name = "_Recycled")]
#[derive(Debug)]
pub(super) struct Recycled {
    _buffer: Buffer,
}

/// C-like strides for the axes in the order of another array's strides; the order of equals stays.
fn ordered_like(prototype: &Array<'_>) -> Dims<isize> {
    let (shape, strides) = (prototype.shape(), prototype.strides());
    let size = prototype.dtype().size();
    let contiguous = c_strides(shape, size);
    let is = |like: &[isize]| (0..shape.len()).all(|i| shape[i] <= 1 || strides[i] == like[i]);
    if is(&contiguous) || shape.contains(&0) {
        return contiguous;
    }
    let reversed: Dims<usize> = shape.iter().rev().copied().collect();
    let fortran: Dims<isize> = c_strides(&reversed, size).iter().rev().copied().collect();
    if is(&fortran) {
        return fortran;
    }
    // Of equal strides the last axis first.
    let last = shape.len() - 1;
    let mut order: Dims<(usize, usize)> = (0..=last).map(|i| (strides[i].unsigned_abs(), last - i)).collect();
    order.sort_unstable();
    let mut result = contiguous;
    let mut step = size as isize;
    for (_, i) in order {
        result[last - i] = step;
        step *= shape[last - i] as isize;
    }
    result
}

/// The same elements at the same places.
fn same_array(a: &Array<'_>, b: &Array<'_>) -> bool {
    let strides = || a.shape().iter().zip(a.strides().iter().zip(b.strides()));
    arrays::address(a) == arrays::address(b)
        && a.dtype() == b.dtype()
        && a.shape() == b.shape()
        && !b.swapped
        && strides().all(|(&len, (x, y))| len <= 1 || x == y)
}

/// Whether an element of one lies on an element of the other. Where that is too hard to say, it does.
fn shares_memory(out: &View<'_>, input: &View<'_>) -> PyResult<bool> {
    /// Candidates `numpy.shares_memory` may try; layouts that occur need a handful.
    const MAX_WORK: usize = 100_000;
    static SHARES: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let (a, b) = (span(out.array()), span(input.array()));
    if a.0 >= b.1 || b.0 >= a.1 {
        return Ok(false);
    }
    if !arrays::is_ndarray(input.object()) {
        // Lent memory whose extent meets that of `out`: no view of one buffer can be had from two libraries without asking for this.
        return Ok(true);
    }
    let py = out.object().py();
    let shares = SHARES.get_or_try_init(py, || Ok::<_, PyErr>(py.import("numpy")?.getattr("shares_memory")?.unbind()))?;
    let kwargs = PyDict::new(py);
    kwargs.set_item(intern!(py, "max_work"), MAX_WORK)?;
    match shares.bind(py).call((out.object(), input.object()), Some(&kwargs)) {
        Ok(answer) => answer.is_truthy(),
        Err(error) if error.is_instance_of::<PyMemoryError>(py) => Err(error),
        Err(_) => Ok(true),
    }
}

/// The addresses from the first byte reached to one past the last; empty for no elements.
fn span(array: &Array<'_>) -> (usize, usize) {
    let start = arrays::address(array);
    if array.shape().contains(&0) {
        return (start, start);
    }
    let mut low = start;
    let mut high = start.wrapping_add(array.dtype().size());
    for (&len, &stride) in array.shape().iter().zip(array.strides()) {
        let reach = (len as isize - 1).wrapping_mul(stride);
        if reach < 0 {
            low = low.wrapping_add_signed(reach);
        } else {
            high = high.wrapping_add_signed(reach);
        }
    }
    (low, high)
}
