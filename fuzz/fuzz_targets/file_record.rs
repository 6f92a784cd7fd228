//! Records of the file store: the name of a file, and from its second line on what is in it.

#![no_main]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use flannel_subnet_file::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzz::bounded(bytes, || {
    let (name, text) = fuzz::two_lines(bytes);
    fuzzing::names(OsStr::from_bytes(name), OsStr::from_bytes(text));
    fuzzing::record(text);
}));
