/* Writes its standard input line by line as Falco's program_output does:
 * popen(3), and with keep_alive one program for all lines, without one for each.
 *
 *	popen true|false PROGRAM
 */
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
	static char line[1 << 20];
	FILE *out = NULL;
	int failed = 0;

	if (argc != 3)
		return 2;
	while (fgets(line, sizeof line, stdin) != NULL) {
		if (out == NULL && (out = popen(argv[2], "w")) == NULL)
			return 1;
		if (fputs(line, out) == EOF || fflush(out) == EOF)
			failed = 1;
		if (strcmp(argv[1], "true") != 0) {
			failed |= pclose(out) != 0;
			out = NULL;
		}
	}
	if (out != NULL)
		failed |= pclose(out) != 0;
	return failed;
}
