//! NumPy arrays (and what becomes one) as views that the core reads.

use core::ffi::c_int;

use numpy::npyffi::{self, NPY_ARRAY_WRITEABLE, NPY_TYPES, NpyTypes, PY_ARRAY_API, PyArray_Descr, PyArrayObject};
use pyo3::exceptions::{PyImportError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyModule, PyType};

use super::dlpack;
use super::errors::{shape as show, type_error, type_name, value_error};
use crate::array::{Array, DType, Dims};

/// An array to read: the object that keeps its memory alive, and a snapshot of its shape and strides.
///
/// The snapshot is taken once, because Python code that runs later in the same call (`__index__` of an option, another thread) may give
/// the array another shape.
#[derive(Debug)]
pub(super) struct View<'py> {
    object: Bound<'py, PyAny>,
    array: Array<'py>,
    /// Memory lent through DLPack, which `object` does not hold.
    _lent: Option<dlpack::Lent>,
}

impl<'py> View<'py> {
    /// The memory for the core, while the view lives.
    pub(super) fn array(&self) -> &Array<'_> {
        &self.array
    }

    pub(super) fn dtype(&self) -> DType {
        self.array.dtype()
    }

    pub(super) fn shape(&self) -> &[usize] {
        self.array.shape()
    }

    pub(super) fn ndim(&self) -> usize {
        self.array.shape().len()
    }

    /// The object it was made from: an ndarray unless it came by DLPack.
    pub(super) fn object(&self) -> &Bound<'py, PyAny> {
        &self.object
    }

    pub(super) fn from_dlpack(object: &Bound<'py, PyAny>, array: Array<'py>, lent: dlpack::Lent) -> Self {
        Self { object: object.clone(), array, _lent: Some(lent) }
    }
}

/// NumPy's name of a type.
pub(super) fn name_of(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::Bf16 => "bfloat16",
        DType::F32 => "float32",
        DType::F64 => "float64",
        DType::I8 => "int8",
        DType::I16 => "int16",
        DType::I32 => "int32",
        DType::I64 => "int64",
        DType::U8 => "uint8",
        DType::U16 => "uint16",
        DType::U32 => "uint32",
        DType::U64 => "uint64",
        DType::Bool => "bool",
    }
}

/// What an argument may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accept {
    /// The four float types.
    Floats,
    /// Integers and the four float types: class indices or class probabilities.
    Target,
    /// Integers.
    Integers,
    /// Any real type; a `longdouble` is converted to float64.
    Reals,
    /// Truth values.
    Bools,
}

impl Accept {
    fn takes(self, dtype: DType) -> bool {
        match self {
            Self::Floats => dtype.is_float(),
            Self::Target => dtype != DType::Bool,
            Self::Integers => dtype != DType::Bool && !dtype.is_float(),
            Self::Reals => true,
            Self::Bools => dtype == DType::Bool,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Floats => "float16, bfloat16, float32 or float64",
            Self::Target => "integers (class indices) or floats (class probabilities)",
            Self::Integers => "integers (class indices)",
            Self::Reals => "real numbers",
            Self::Bools => "booleans",
        }
    }

    fn remedy(self, dtype: Option<DType>, argument: &str) -> String {
        match (self, dtype) {
            (Self::Floats, Some(_)) => format!("; convert with {argument}.astype(numpy.float32)"),
            (Self::Bools, Some(_)) => format!("; compare first, as in {argument} != 0"),
            (Self::Integers, Some(d)) if d.is_float() => format!("; convert with {argument}.astype(numpy.int64)"),
            (Self::Integers | Self::Target, Some(DType::Bool)) => format!("; convert with {argument}.astype(numpy.int8)"),
            _ => String::new(),
        }
    }
}

/// Makes a view of an argument: ndarrays as they are, DLPack without a copy, anything else by `numpy.asarray`.
pub(super) fn view<'py>(object: &Bound<'py, PyAny>, argument: &'static str, accept: Accept) -> PyResult<View<'py>> {
    let py = object.py();
    if is_ndarray(object) {
        if !is_exact_ndarray(object) {
            refuse_masked(object, argument)?;
        }
        return ndarray(object, argument, accept);
    }
    refuse_lazy(object, argument)?;
    if object.hasattr(intern!(py, "__dlpack__"))? && object.hasattr(intern!(py, "__dlpack_device__"))? {
        let view = dlpack::view(object, argument)?;
        return if accept.takes(view.dtype()) {
            Ok(view)
        } else {
            Err(wrong_dtype(argument, name_of(view.dtype()), Some(view.dtype()), accept))
        };
    }
    let array = numpy(py)?.call_method1(intern!(py, "asarray"), (object,)).map_err(|error| not_an_array(py, error, argument))?;
    if matches!(accept, Accept::Target | Accept::Integers) && object.hasattr(intern!(py, "__len__"))? && is_empty_default(&array) {
        // An empty list has no type of its own; NumPy's choice of float64 must not turn no labels into no probabilities.
        return ndarray(&array.call_method1(intern!(py, "astype"), ("int64",))?, argument, accept);
    }
    ndarray(&array, argument, accept)
}

fn numpy(py: Python<'_>) -> PyResult<&Bound<'_, PyModule>> {
    static NUMPY: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    NUMPY.get_or_try_init(py, || py.import("numpy").map(Bound::unbind)).map(|module| module.bind(py))
}

pub(super) fn is_ndarray(object: &Bound<'_, PyAny>) -> bool {
    // SAFETY: attached, `object` is a live object.
    unsafe { npyffi::PyArray_Check(object.py(), object.as_ptr()) != 0 }
}

fn is_exact_ndarray(object: &Bound<'_, PyAny>) -> bool {
    // SAFETY: attached, `object` is a live object.
    unsafe { npyffi::PyArray_CheckExact(object.py(), object.as_ptr()) != 0 }
}

fn not_an_array(py: Python<'_>, error: PyErr, argument: &str) -> PyErr {
    let kind: fn(String) -> PyErr = if error.is_instance_of::<PyTypeError>(py) {
        PyTypeError::new_err
    } else if error.is_instance_of::<PyValueError>(py) {
        PyValueError::new_err
    } else {
        return error;
    };
    let named = kind(format!("{argument} cannot be made an array: {}", error.value(py)));
    named.set_cause(py, Some(error));
    named
}

/// A mask that nobody looks at would be a silent error.
fn refuse_masked(object: &Bound<'_, PyAny>, argument: &str) -> PyResult<()> {
    static MASKED: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let py = object.py();
    if object.is_instance(MASKED.import(py, "numpy.ma", "MaskedArray")?)? {
        return Err(type_error(format!(
            "{argument} is a numpy.ma.MaskedArray, whose mask would be ignored; pass {argument}.data, and leave out classes with where= or rows with ignore_index="
        )));
    }
    Ok(())
}

fn refuse_lazy(object: &Bound<'_, PyAny>, argument: &str) -> PyResult<()> {
    let py = object.py();
    // Dask's own protocol for "this is a collection"; xarray and others answer None when nothing in them is lazy.
    let lazy = match object.getattr_opt(intern!(py, "__dask_graph__"))? {
        Some(graph) => graph.is_callable() && graph.call0().map_or(true, |graph| !graph.is_none()),
        None => object.get_type().module().is_ok_and(|module| module.to_string_lossy().split('.').next() == Some("dask")),
    };
    if lazy {
        return Err(type_error(format!(
            "{argument} is lazy ({}, a dask collection) and is not computed silently; pass {argument}.compute()",
            type_name(object)
        )));
    }
    Ok(())
}

fn raw<'a>(object: &'a Bound<'_, PyAny>) -> &'a npyffi::PyArrayObject_fields {
    debug_assert!(is_ndarray(object));
    // SAFETY: every caller has checked `is_ndarray`; the fields live as long as the object, whose reference outlives the result.
    unsafe { &*npyffi::_PyArray_GET_ITEM_DATA(object.as_ptr().cast::<PyArrayObject>()) }
}

/// Shape and strides of an ndarray.
fn layout(object: &Bound<'_, PyAny>) -> (Dims<usize>, Dims<isize>) {
    let fields = raw(object);
    let ndim = fields.nd as usize;
    if ndim == 0 {
        return (Dims::new(), Dims::new());
    }
    // SAFETY: NumPy keeps `nd` lengths (none negative) and `nd` strides at these pointers; they are copied before any other code runs.
    unsafe {
        let dims = core::slice::from_raw_parts(fields.dimensions, ndim);
        let strides = core::slice::from_raw_parts(fields.strides, ndim);
        (dims.iter().map(|&len| len as usize).collect(), Dims::from_slice(strides))
    }
}

fn ndarray<'py>(object: &Bound<'py, PyAny>, argument: &'static str, accept: Accept) -> PyResult<View<'py>> {
    let py = object.py();
    let (dtype, swapped) = match recognise(object) {
        Known::Type(dtype, swapped) if accept.takes(dtype) => (dtype, swapped),
        Known::LongDouble if matches!(accept, Accept::Reals | Accept::Target) => {
            let double = object.call_method1(intern!(py, "astype"), (intern!(py, "float64"),))?;
            return ndarray(&double, argument, accept);
        }
        known => {
            if let (Known::Other, Some(converted)) = (&known, convert(object, accept)?) {
                return ndarray(&converted, argument, accept);
            }
            let given = object.getattr(intern!(py, "dtype"))?.str()?.to_string_lossy().into_owned();
            let dtype = if let Known::Type(dtype, _) = known { Some(dtype) } else { None };
            return Err(wrong_dtype(argument, &given, dtype, accept));
        }
    };
    let (shape, strides) = layout(object);
    // SAFETY: an ndarray's shape and strides reach only memory that it keeps alive, and the view holds a reference to it.
    let array = unsafe { Array::new(raw(object).data.cast(), dtype, swapped, &shape, &strides) };
    Ok(View { object: object.clone(), array, _lent: None })
}

/// The small number types that extensions of NumPy define (`int4`, `float8_e5m2`, ...), where any integer or any real type is taken.
fn convert<'py>(object: &Bound<'py, PyAny>, accept: Accept) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = object.py();
    let number = {
        // SAFETY: an ndarray's descr is a live dtype; its fields are only read.
        unsafe { (*npyffi::_PyDataType_GET_ITEM_DATA(raw(object).descr)).type_num }
    };
    if number < NPY_TYPES::NPY_USERDEF as c_int {
        return Ok(None);
    }
    let wide: &[&str] = match accept {
        Accept::Integers | Accept::Target => &["int64"],
        Accept::Reals => &["float64"],
        Accept::Floats | Accept::Bools => &[],
    };
    for &wide in wide {
        let safe = numpy(py)?.call_method1(intern!(py, "can_cast"), (object.getattr(intern!(py, "dtype"))?, wide, "safe"))?;
        if safe.is_truthy()? {
            return object.call_method1(intern!(py, "astype"), (wide,)).map(Some);
        }
    }
    Ok(None)
}

fn wrong_dtype(argument: &str, given: &str, dtype: Option<DType>, accept: Accept) -> PyErr {
    let remedy = if accept == Accept::Floats && given.starts_with("float") {
        format!("; convert with {argument}.astype(numpy.float64)")
    } else if given.ends_with("V2") {
        // What a bfloat16 array becomes on its way through numpy.save and numpy.load.
        format!("; if these are saved bfloat16 numbers, pass {argument}.view(ml_dtypes.bfloat16)")
    } else {
        accept.remedy(dtype, argument)
    };
    type_error(format!("{argument} has dtype {given}; accepted are {}{remedy}", accept.words()))
}

/// What a dtype is to this crate.
enum Known {
    Type(DType, bool),
    LongDouble,
    Other,
}

fn recognise(object: &Bound<'_, PyAny>) -> Known {
    const SWAPPED: u8 = if cfg!(target_endian = "little") { b'>' } else { b'<' };
    let py = object.py();
    let descr = raw(object).descr;
    // SAFETY: an ndarray's descr is a live dtype; its fields are only read.
    let (number, order) = unsafe {
        let fields = &*npyffi::_PyDataType_GET_ITEM_DATA(descr);
        (fields.type_num, fields.byteorder as u8)
    };
    let swapped = order == SWAPPED;
    let builtin = |known: NPY_TYPES| known as c_int;
    if let Some(dtype) = by_number(number) {
        return Known::Type(dtype, swapped);
    }
    if number == builtin(NPY_TYPES::NPY_LONGDOUBLE) {
        // SAFETY: as above.
        return if unsafe { npyffi::PyDataType_ELSIZE(py, descr) } == 8 { Known::Type(DType::F64, swapped) } else { Known::LongDouble };
    }
    if number >= builtin(NPY_TYPES::NPY_USERDEF) && is_bfloat16(object, number) {
        return Known::Type(DType::Bf16, swapped);
    }
    Known::Other
}

fn by_number(number: c_int) -> Option<DType> {
    const LONG: (DType, DType) = if size_of::<core::ffi::c_long>() == 8 { (DType::I64, DType::U64) } else { (DType::I32, DType::U32) };
    /// Indexed by NumPy's type number, which its ABI fixes.
    const BY_NUMBER: [DType; 13] = [
        DType::Bool,
        DType::I8,
        DType::U8,
        DType::I16,
        DType::U16,
        DType::I32,
        DType::U32,
        LONG.0,
        LONG.1,
        DType::I64,
        DType::U64,
        DType::F32,
        DType::F64,
    ];
    if number == NPY_TYPES::NPY_HALF as c_int {
        return Some(DType::F16);
    }
    BY_NUMBER.get(usize::try_from(number).ok()?).copied()
}

/// Type number and dtype of bfloat16, known since the first array of it. The number is given out at run time, so the name decides once.
static BFLOAT16: PyOnceLock<(c_int, Py<PyAny>)> = PyOnceLock::new();

fn is_bfloat16(object: &Bound<'_, PyAny>, number: c_int) -> bool {
    let py = object.py();
    if let Some((known, _)) = BFLOAT16.get(py) {
        return *known == number;
    }
    let named = || -> PyResult<bool> {
        let dtype = object.getattr(intern!(py, "dtype"))?;
        let is =
            dtype.getattr(intern!(py, "name"))?.extract::<String>()? == "bfloat16" && dtype.getattr("itemsize")?.extract::<usize>()? == 2;
        if is {
            let native = dtype.call_method1("newbyteorder", ("=",))?;
            let _ = BFLOAT16.set(py, (number, native.unbind()));
        }
        Ok(is)
    };
    named().unwrap_or(false)
}

/// The dtype object of bfloat16.
fn bfloat16(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    if BFLOAT16.get(py).is_none() {
        let scalar = py.import("ml_dtypes").and_then(|module| module.getattr("bfloat16")).map_err(|error| {
            if error.is_instance_of::<PyImportError>(py) {
                PyImportError::new_err("NumPy has no bfloat16 of its own for this result; install ml_dtypes (pip install ml_dtypes)")
            } else {
                error
            }
        })?;
        let dtype = numpy(py)?.call_method1("dtype", (scalar,))?;
        let number = dtype.getattr("num")?.extract::<c_int>()?;
        let _ = BFLOAT16.set(py, (number, dtype.unbind()));
    }
    BFLOAT16.get(py).map(|(_, dtype)| dtype.bind(py)).ok_or_else(|| type_error("bfloat16 is not known to NumPy"))
}

/// A new reference to NumPy's dtype for a result, native byte order.
pub(super) fn descr(py: Python<'_>, dtype: DType) -> PyResult<*mut PyArray_Descr> {
    let number = match dtype {
        DType::Bf16 => return Ok(bfloat16(py)?.clone().into_ptr().cast()),
        DType::F16 => NPY_TYPES::NPY_HALF,
        DType::F32 => NPY_TYPES::NPY_FLOAT,
        DType::F64 => NPY_TYPES::NPY_DOUBLE,
        DType::Bool => NPY_TYPES::NPY_BOOL,
        DType::I8 => NPY_TYPES::NPY_BYTE,
        DType::U8 => NPY_TYPES::NPY_UBYTE,
        DType::I16 => NPY_TYPES::NPY_SHORT,
        DType::U16 => NPY_TYPES::NPY_USHORT,
        DType::I32 => NPY_TYPES::NPY_INT,
        DType::U32 => NPY_TYPES::NPY_UINT,
        // Of NumPy's two types of 64 bits the one that `numpy.int64` names.
        DType::I64 if size_of::<core::ffi::c_long>() == 8 => NPY_TYPES::NPY_LONG,
        DType::U64 if size_of::<core::ffi::c_long>() == 8 => NPY_TYPES::NPY_ULONG,
        DType::I64 => NPY_TYPES::NPY_LONGLONG,
        DType::U64 => NPY_TYPES::NPY_ULONGLONG,
    };
    // SAFETY: attached; a builtin number always has a dtype.
    Ok(unsafe { PY_ARRAY_API.PyArray_DescrFromType(py, number as c_int) })
}

fn is_empty_default(array: &Bound<'_, PyAny>) -> bool {
    matches!(recognise(array), Known::Type(DType::F64, false)) && layout(array).0.contains(&0)
}

/// The argument `out`: a writable ndarray of this shape and dtype that holds every element once, aligned and native.
pub(super) fn writable<'py>(object: &Bound<'py, PyAny>, shape: &[usize], dtype: DType) -> PyResult<View<'py>> {
    if !is_ndarray(object) {
        return Err(type_error(format!(
            "out must be a numpy.ndarray, got {}; pass its memory as an array (t.numpy() for a torch tensor)",
            type_name(object)
        )));
    }
    refuse_masked(object, "out")?;
    let found = match recognise(object) {
        Known::Type(found, swapped) if found == dtype => swapped,
        _ => {
            let given = object.getattr("dtype")?.str()?.to_string_lossy().into_owned();
            return Err(type_error(format!("out has dtype {given}; the result has dtype {}", name_of(dtype))));
        }
    };
    if found {
        return Err(value_error("out is byte-swapped; it must have the machine's byte order"));
    }
    let (dims, strides) = layout(object);
    if dims.as_slice() != shape {
        return Err(value_error(format!("out has shape {}; the result has shape {}", show(&dims), show(shape))));
    }
    if raw(object).flags & NPY_ARRAY_WRITEABLE == 0 {
        return Err(value_error("out is read-only"));
    }
    let data = raw(object).data.cast::<u8>();
    let size = dtype.size();
    let odd = |stride: &isize| !stride.unsigned_abs().is_multiple_of(size);
    let moving = || dims.iter().zip(&strides).filter(|(len, _)| **len > 1).map(|(_, stride)| stride);
    if !dims.contains(&0) {
        if !data.addr().is_multiple_of(size) || moving().any(odd) {
            return Err(value_error(format!("out is misaligned; its elements must lie on multiples of {size} bytes")));
        }
        if overlaps_itself(&dims, &strides, size) {
            return Err(value_error("out overlaps itself: several of its elements share memory (a broadcast or as_strided view?)"));
        }
    }
    // SAFETY: as in `ndarray`.
    let array = unsafe { Array::new(data, dtype, false, &dims, &strides) };
    Ok(View { object: object.clone(), array, _lent: None })
}

/// Whether two indices may reach the same byte. Sorted by stride, each axis has to step over all that the smaller ones reach; every view made
/// by slicing and transposing does, and the exotic rest is refused.
fn overlaps_itself(dims: &[usize], strides: &[isize], size: usize) -> bool {
    let mut axes: Dims<(usize, usize)> =
        dims.iter().zip(strides).filter(|(len, _)| **len > 1).map(|(&len, stride)| (stride.unsigned_abs(), len)).collect();
    axes.sort_unstable();
    let mut reach = size;
    for (stride, len) in axes {
        if stride < reach {
            return true;
        }
        reach = reach.saturating_add(stride.saturating_mul(len - 1));
    }
    false
}

/// The address of the first element.
pub(super) fn address(array: &Array<'_>) -> usize {
    array.ptr.addr()
}

/// The NumPy type of arrays.
pub(super) fn array_type(py: Python<'_>) -> *mut pyo3::ffi::PyTypeObject {
    // SAFETY: attached.
    unsafe { npyffi::get_type_object(py, NpyTypes::PyArray_Type) }
}

/// Where a fresh ndarray keeps its elements.
pub(super) fn data(object: &Bound<'_, PyAny>) -> *mut u8 {
    raw(object).data.cast()
}
