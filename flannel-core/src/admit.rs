//! Admission: which records of the store become peers, and why the others do not.
