//! What holds for the whole process: instruction set, number of threads, result memory, and where each came from.

use std::ffi::CString;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pyo3::exceptions::PyRuntimeWarning;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple};

use super::arrays::{Accept, view};
use super::errors::value_error;
use super::options;
use super::results::Output;
use crate::memory;
use crate::ops::{self, Error, Exec, Traffic};
use crate::simd::Level;
use crate::threads;
use crate::tunables::tunables;

/// Calls on fewer elements keep the GIL: they end before another thread could be scheduled.
const DETACH_FROM: usize = 1 << 14;
/// More threads than this are never asked for, whatever the settings say.
const MOST_THREADS: usize = 1024;

/// Environment variables for the number of threads, the first valid one counts.
const THREAD_VARIABLES: [&str; 3] = ["CROSSENT_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS"];
const LEVEL_VARIABLE: &str = "CROSSENT_SIMD";
const CACHE_VARIABLE: &str = "CROSSENT_CACHE_MB";

/// Index into [`levels`].
static LEVEL: AtomicUsize = AtomicUsize::new(0);
/// 0: not set.
static SET_THREADS: AtomicUsize = AtomicUsize::new(0);
static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
static THREADS_VAR: PyOnceLock<(Py<PyAny>, Py<PyAny>)> = PyOnceLock::new();

/// What the environment said at import.
#[derive(Debug, Default)]
struct Environment {
    threads: Option<(usize, &'static str)>,
    level: bool,
    cache: bool,
}

fn levels() -> &'static [Level] {
    static LEVELS: OnceLock<Vec<Level>> = OnceLock::new();
    LEVELS.get_or_init(|| Level::all().collect())
}

fn level() -> Level {
    levels()[LEVEL.load(Ordering::Relaxed)]
}

/// Runs work of the core on arrays of `elements` elements, without the GIL when it takes long.
pub(super) fn run<T: Send>(
    py: Python<'_>,
    elements: usize,
    work: impl FnOnce(&Exec) -> Result<T, Error> + Send,
) -> PyResult<Result<T, Error>> {
    let threads = if elements < tunables().threads_from { 1 } else { number_of_threads(py)?.0.min(MOST_THREADS) };
    let exec = Exec { level: level(), threads };
    Ok(if elements < DETACH_FROM { work(&exec) } else { py.detach(|| work(&exec)) })
}

/// How to run what is not worth another thread.
pub(super) fn serial() -> Exec {
    Exec { level: level(), threads: 1 }
}

/// Reads the environment and makes the context variable; called once, at import, when no thread of ours exists.
pub(super) fn start(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    let mut environment = Environment::default();
    for name in THREAD_VARIABLES {
        if let Some(given) = variable(name) {
            // OpenMP allows a list, one number per nesting level.
            let first = if name == "OMP_NUM_THREADS" { given.split(',').next().unwrap_or_default() } else { &given };
            match first.trim().parse::<usize>() {
                Ok(number) if number > 0 => {
                    environment.threads = Some((number, name));
                    break;
                }
                _ => warn(py, name, &given, "a number of threads, 1 or more")?,
            }
        }
    }
    if let Some(given) = variable(LEVEL_VARIABLE) {
        match position(given.trim()) {
            Some(index) => {
                LEVEL.store(index, Ordering::Relaxed);
                environment.level = true;
            }
            None => warn(py, LEVEL_VARIABLE, &given, &format!("a level of this machine: {}", names()))?,
        }
    }
    if let Some(given) = variable(CACHE_VARIABLE) {
        match given.trim().parse::<usize>().ok().and_then(|mib| mib.checked_mul(1 << 20)) {
            Some(bytes) => {
                memory::set_limit(bytes);
                environment.cache = true;
            }
            None => warn(py, CACHE_VARIABLE, &given, "a number of MiB, 0 or more")?,
        }
    }
    let _ = ENVIRONMENT.set(environment);

    let (variable, _) = THREADS_VAR.get_or_try_init(py, || {
        let kwargs = PyDict::new(py);
        kwargs.set_item("default", py.None())?;
        let variable = py.import("contextvars")?.getattr("ContextVar")?.call(("crossent.threads",), Some(&kwargs))?;
        let get = variable.getattr("get")?;
        Ok::<_, PyErr>((variable.unbind(), get.unbind()))
    })?;
    Ok(variable.bind(py).clone())
}

fn variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

fn warn(py: Python<'_>, name: &str, given: &str, accepted: &str) -> PyResult<()> {
    let message = format!("crossent: the environment variable {name}={given:?} is skipped; accepted is {accepted}");
    let message = CString::new(message.replace('\0', "\\0"))?;
    PyErr::warn(py, &py.get_type::<PyRuntimeWarning>(), &message, 1)
}

fn position(name: &str) -> Option<usize> {
    levels().iter().position(|level| level.name() == name)
}

fn names() -> String {
    levels().iter().map(|level| level.name()).collect::<Vec<_>>().join(", ")
}

/// The number of threads that holds here, and who set it.
fn number_of_threads(py: Python<'_>) -> PyResult<(usize, &'static str)> {
    if let Some((_, get)) = THREADS_VAR.get(py) {
        let local = get.bind(py).call0()?;
        if !local.is_none() {
            return Ok((count(&local)?, "threads()"));
        }
    }
    let set = SET_THREADS.load(Ordering::Relaxed);
    if set > 0 {
        return Ok((set, "set_num_threads()"));
    }
    Ok(ENVIRONMENT.get().and_then(|environment| environment.threads).unwrap_or_else(|| (available(), "CPUs this process may use")))
}

/// `threads::available` looks at files of the control group, so its answer is kept, for one process: a child may have been given other CPUs.
fn available() -> usize {
    static KNOWN: AtomicU64 = AtomicU64::new(0);
    let process = u64::from(std::process::id());
    let known = KNOWN.load(Ordering::Relaxed);
    if known >> 32 == process && known != 0 {
        return (known & 0xffff_ffff) as usize;
    }
    let number = threads::available().clamp(1, u32::MAX as usize);
    KNOWN.store((process << 32) | number as u64, Ordering::Relaxed);
    number
}

fn count(n: &Bound<'_, PyAny>) -> PyResult<usize> {
    let given = options::integer(n, "n")?;
    usize::try_from(given)
        .ok()
        .filter(|&n| n > 0)
        .ok_or_else(|| value_error(format!("n must be a number of threads, 1 or more, got {given}")))
}

/// Checks a number of threads.
#[pyfunction]
#[pyo3(signature = (n, /))]
pub(super) fn check_num_threads(n: &Bound<'_, PyAny>) -> PyResult<usize> {
    count(n)
}

#[pyfunction]
#[pyo3(signature = (n, /))]
pub(super) fn set_num_threads(n: &Bound<'_, PyAny>) -> PyResult<()> {
    SET_THREADS.store(count(n)?, Ordering::Relaxed);
    Ok(())
}

#[pyfunction]
pub(super) fn get_num_threads(py: Python<'_>) -> PyResult<usize> {
    Ok(number_of_threads(py)?.0)
}

#[pyfunction]
pub(super) fn simd_levels(py: Python<'_>) -> PyResult<Bound<'_, PyTuple>> {
    PyTuple::new(py, levels().iter().map(|level| level.name()))
}

#[pyfunction]
pub(super) fn simd_level() -> &'static str {
    level().name()
}

#[pyfunction]
#[pyo3(signature = (name, /))]
pub(super) fn set_simd_level(name: &Bound<'_, PyAny>) -> PyResult<()> {
    let given = name.extract::<String>().map_err(|_| {
        super::errors::type_error(format!("name must be a string, one of {}; got {}", names(), super::errors::type_name(name)))
    })?;
    let index = position(&given).ok_or_else(|| {
        let known = if Level::from_name(&given).is_some() { "this machine lacks it" } else { "there is no such level" };
        value_error(format!("name = {given:?}: {known}; accepted are {}", names()))
    })?;
    LEVEL.store(index, Ordering::Relaxed);
    Ok(())
}

#[pyfunction]
#[pyo3(signature = (n, /))]
pub(super) fn set_cache_limit(py: Python<'_>, n: &Bound<'_, PyAny>) -> PyResult<()> {
    let given = options::integer(n, "n")?;
    let bytes = usize::try_from(given).map_err(|_| value_error(format!("n must be a number of bytes, 0 or more, got {given}")))?;
    py.detach(|| memory::set_limit(bytes));
    Ok(())
}

#[pyfunction]
pub(super) fn clear_cache(py: Python<'_>) {
    py.detach(memory::clear);
}

/// One pass of a kind over flat float32 arrays of one length, as the benchmarks measure what the memory allows.
#[pyfunction]
#[pyo3(signature = (kind, src, dst, /))]
pub(super) fn bandwidth(py: Python<'_>, kind: &str, src: &Bound<'_, PyAny>, dst: &Bound<'_, PyAny>) -> PyResult<()> {
    let traffic = match kind {
        "read" => Traffic::Read,
        "copy" => Traffic::Copy,
        "stream" => Traffic::Stream,
        "rewrite" => Traffic::Rewrite,
        _ => return Err(value_error(format!("kind must be 'read', 'copy', 'stream' or 'rewrite', got {kind:?}"))),
    };
    let src = view(src, "src", Accept::Floats)?;
    let dst = Output::given(dst, src.shape(), src.dtype(), false, &[("src", &src)])?;
    let (array, out) = (src.array(), dst.out());
    run(py, array.size(), |exec| ops::bandwidth(exec, traffic, array, out))?.map_err(|error| match error {
        Error::Invalid(what) => value_error(what),
        other => super::errors::internal(other),
    })
}

/// What `show_config` shows.
#[pyfunction]
pub(super) fn config(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let environment = ENVIRONMENT.get();
    let simd = PyDict::new(py);
    simd.set_item("level", level().name())?;
    let from_environment =
        environment.is_some_and(|e| e.level) && variable(LEVEL_VARIABLE).is_some_and(|name| name.trim() == level().name());
    let best = level() == Level::best();
    simd.set_item(
        "from",
        if from_environment {
            LEVEL_VARIABLE
        } else if best {
            "best of this machine"
        } else {
            "set_simd_level()"
        },
    )?;
    simd.set_item("levels", simd_levels(py)?)?;

    let threading = PyDict::new(py);
    let (number, source) = number_of_threads(py)?;
    threading.set_item("number", number)?;
    threading.set_item("from", source)?;
    threading.set_item("available", available())?;

    let cache = PyDict::new(py);
    cache.set_item("limit", memory::limit())?;
    let from = match environment {
        Some(e) if e.cache => CACHE_VARIABLE,
        _ if memory::limit() == memory::DEFAULT_LIMIT => "default",
        _ => "set_cache_limit()",
    };
    cache.set_item("from", from)?;
    cache.set_item("kept", memory::kept())?;

    let tunables_dict = PyDict::new(py);
    tunables_dict.set_item("release the GIL from elements", DETACH_FROM)?;
    for (name, value) in tunables().entries() {
        tunables_dict.set_item(name, value)?;
    }
    tunables_dict.set_item("recycle results from bytes", memory::RECYCLE_FROM)?;

    let build = PyDict::new(py);
    build.set_item("rustc", option_env!("CROSSENT_RUSTC").unwrap_or("unknown"))?;
    build.set_item("target", option_env!("CROSSENT_TARGET").unwrap_or(std::env::consts::ARCH))?;
    build.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;

    let all = PyDict::new(py);
    all.set_item("version", env!("CARGO_PKG_VERSION"))?;
    all.set_item("simd", simd)?;
    all.set_item("threads", threading)?;
    all.set_item("result memory", cache)?;
    all.set_item("tunables", tunables_dict)?;
    all.set_item("build", build)?;
    Ok(all)
}
