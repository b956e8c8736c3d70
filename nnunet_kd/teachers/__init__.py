"""Teachers: anything that turns a training batch into targets. One file per kind; all return TeacherOutput."""
